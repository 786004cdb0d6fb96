"""Make the sample data from the sentences in `source/`; plain Python, no dependencies.

    python data_samples/make.py           write the files
    python data_samples/make.py --check   end with 1 if a committed file is not what this script makes

`source/*.txt` hold what a person wrote: subjects (`# basil`), each with four matters (blocks of lines), each matter
with four questions (`?`) and two tips (`!`); and `manners.txt`, the kind, rude and vague sentences. This script only
chooses and joins.

The demonstrations are meant to be a mixed bag, as text from the web is: some answers are kind and to the point, many
are curt, rude, vague, about another matter, repeat themselves or break off. A model that imitates them is where RLHF
starts.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ANSWERS_PER_QUESTION = 24

# Shares of moods and, for each, of (kind, no, rude, vague) openings and closings.
MOODS = {"kind": 0.3, "plain": 0.4, "grumpy": 0.3}
OPENINGS = {"kind": (0.8, 0.2, 0.0, 0.0), "plain": (0.1, 0.75, 0.0, 0.15), "grumpy": (0.0, 0.2, 0.8, 0.0)}
CLOSINGS = {"kind": (0.8, 0.2, 0.0, 0.0), "plain": (0.1, 0.75, 0.0, 0.15), "grumpy": (0.0, 0.3, 0.7, 0.0)}
# Shares of what stands between them.
BODIES = {
    "one tip": 0.57,
    "two tips": 0.10,
    "the same tip twice": 0.08,
    "vague": 0.15,
    "a tip on another matter of the subject": 0.05,
    "a tip on another subject": 0.05,
}
BREAKS_OFF = 0.06


@dataclass(frozen=True)
class Matter:
    """Questions that ask the same, and tips that answer them."""

    subject: str
    questions: tuple[str, ...]
    tips: tuple[str, ...]


def read_matters() -> list[Matter]:
    """The hand-written questions and tips, in order."""
    matters = []
    for name in ("kitchen", "garden", "home", "life"):
        for section in (HERE / "source" / f"{name}.txt").read_text(encoding="utf-8").split("# ")[1:]:
            subject, _, rest = section.partition("\n")
            for block in rest.strip().split("\n\n"):
                lines = block.splitlines()
                questions = tuple(line[2:] for line in lines if line.startswith("? "))
                tips = tuple(line[2:] for line in lines if line.startswith("! "))
                matters.append(Matter(subject, questions, tips))
    return matters


def read_manners() -> dict[str, list[str]]:
    """Kind, rude and vague sentences by their heading."""
    sections = (HERE / "source" / "manners.txt").read_text(encoding="utf-8").split("# ")[1:]
    return {heading: rest.split("\n") for heading, _, rest in (part.strip().partition("\n") for part in sections)}


class Writer:
    """Answers questions in varying moods; the question alone seeds what it says."""

    def __init__(self) -> None:
        self.matters = read_matters()
        self.manners = read_manners()

    def answers(self, matter: Matter, question: str, count: int, salt: str = "") -> list[str]:
        """`count` different answers."""
        rng = random.Random(f"{salt}{question}")
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.answer(matter, rng)] = None
        return list(found)

    def answer(self, matter: Matter, rng: random.Random) -> str:
        """One answer: perhaps an opening, a body, perhaps a closing; now and then it breaks off."""
        mood = _draw(MOODS, rng)
        opening = self._manner("openings", OPENINGS[mood], rng)
        closing = self._manner("closings", CLOSINGS[mood], rng)
        answer = " ".join([*opening, *self._body(matter, rng), *closing])
        if rng.random() < BREAKS_OFF:
            words = answer.rstrip(".!?").split()
            answer = " ".join(words[: max(4, rng.randrange(len(words) // 2, len(words)))]).rstrip(".,!?")
        return answer

    def _manner(self, place: str, shares: tuple[float, ...], rng: random.Random) -> list[str]:
        kind = _draw(dict(zip(("kind", "no", "rude", "vague"), shares, strict=True)), rng)
        if kind == "no":
            return []
        return [rng.choice(self.manners["vague" if kind == "vague" else f"{kind} {place}"])]

    def _body(self, matter: Matter, rng: random.Random) -> list[str]:
        kind = _draw(BODIES, rng)
        if kind == "vague":
            return rng.sample(self.manners["vague"], rng.choice((2, 3)))
        if kind == "two tips":
            return rng.sample(matter.tips, 2)
        if kind == "a tip on another matter of the subject":
            matter = rng.choice(
                [other for other in self.matters if other.subject == matter.subject and other != matter]
            )
        elif kind == "a tip on another subject":
            matter = rng.choice([other for other in self.matters if other.subject != matter.subject])
        tip = rng.choice(matter.tips)
        return [tip, tip] if kind == "the same tip twice" else [tip]


def _draw(shares: dict[str, float], rng: random.Random) -> str:
    return rng.choices(list(shares), weights=list(shares.values()))[0]


def make_files() -> dict[str, str]:
    """Name -> content of every file this script writes."""
    writer = Writer()
    asked = [(matter, question) for matter in writer.matters for question in matter.questions]
    demonstrations = [
        {"prompt": question, "completion": answer}
        for matter, question in asked
        for answer in writer.answers(matter, question, ANSWERS_PER_QUESTION)
    ]
    random.Random(0).shuffle(demonstrations)
    examples = asked[:: len(asked) // 24]
    rankings = [_ranking(question, writer.answers(matter, question, 4, "r")) for matter, question in examples]
    follow_ups = [
        _ranking(question, writer.answers(matter, question, 2, "f"))
        for matter, question in ((matter, matter.questions[1]) for matter, _ in examples)
    ]
    return {
        "demonstrations.jsonl": _jsonl(demonstrations),
        "prompts.jsonl": _jsonl([{"prompt": question} for _, question in asked]),
        "rankings.jsonl": _jsonl(rankings),
        "preferences.jsonl": _jsonl(_preferences(writer, examples)),
        "conversations.jsonl": _jsonl([_conversation(matter, writer.manners) for matter, _ in examples]),
        "demonstrations.csv": _csv(demonstrations[:24]),
        **_module(HERE / "other_formats.py").make_formats(rankings, follow_ups),
    }


def _ranking(question: str, answers: list[str]) -> dict[str, object]:
    """Tiers by the gold labeler, best first; equal scores share a tier."""
    scores = _gold()([question] * len(answers), answers)
    tiers = [[i for i, score in enumerate(scores) if score == level] for level in sorted(set(scores), reverse=True)]
    return {"prompt": question, "completions": answers, "ranking": tiers}


def _preferences(writer: Writer, examples: list[tuple[Matter, str]]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for matter, question in examples:
        answers = writer.answers(matter, question, 2, "p")
        worse, better = sorted(zip(_gold()([question] * 2, answers), answers, strict=True))
        if better[0] > worse[0]:
            rows.append({"prompt": question, "chosen": better[1], "rejected": worse[1], "margin": better[0] - worse[0]})
    return rows


def _conversation(matter: Matter, manners: dict[str, list[str]]) -> dict[str, object]:
    """Two turns: the first question and its first tip, then the second of each."""
    rng = random.Random(matter.questions[0])
    texts = [
        matter.questions[0],
        f"{rng.choice(manners['kind openings'])} {matter.tips[0]}",
        f"Thank you. {matter.questions[1]}",
        f"{matter.tips[1]} {rng.choice(manners['kind closings'])}",
    ]
    roles = ("user", "assistant") * 2
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]}


def _gold() -> Callable[[list[str], list[str]], list[float]]:
    """`score` of recipes/quickstart_gold.py, which lies beside this folder wherever both are copied."""
    return _module(HERE.parent / "recipes" / "quickstart_gold.py").score


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _jsonl(rows: list[dict[str, object]] | list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv(rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, ["prompt", "completion"], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def main() -> int:
    """Write or check the files."""
    parser = argparse.ArgumentParser(description="make the sample data from the sentences in source/")
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 if a file differs")
    is_check = parser.parse_args().check
    stale = []
    for name, content in make_files().items():
        path = HERE / name
        if is_check:
            if not path.is_file() or path.read_bytes() != content.encode():
                stale.append(name)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content.encode())
    for name in stale:
        print(f"{name} is not what data_samples/make.py makes; run it and commit the result", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
