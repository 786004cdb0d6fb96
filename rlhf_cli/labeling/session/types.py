"""What a labeling session and its faces say to each other, by positions as shown: faces never see an item's order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from rlhf_cli.data.records import Candidates, Prompt, prompt_to_json
from rlhf_cli.errors import EXIT_DATA, RLHFError
from rlhf_cli.progress import printable

ANSWER_LETTERS = "abcdeghijklmoprt"
"""Names of the answers, in the order shown; `f`, `n`, `q`, `s` and `u` are commands at the keyboard."""
MARK_RANGE = (1, 5)
MAX_NOTE = 10_000
MAX_REASON = 500
MAX_NAME = 60


class LabelRefusedError(RLHFError):
    """A label that cannot be taken as it is; nothing was stored."""

    exit_code = EXIT_DATA


class InvalidLabelError(LabelRefusedError):
    """Not a whole, valid label: an answer without a place, a mark out of range."""


class LabelConflictError(LabelRefusedError):
    """The task has another answer already, or its key was used for something else."""


class PlanChangedError(LabelRefusedError):
    """Guidelines, criteria or strengths are others than those that were shown: show the new ones and ask again."""


class UnknownTaskError(LabelRefusedError):
    """No such task, or it is somebody else's."""


@dataclass(frozen=True)
class Entry:
    """What somebody entered for one task; a draft of it may be unfinished.

    Attributes:
        tiers: shown positions, best first; a tier is a tie.
        strength: 1 to 4, how much better the better of two answers is; None for a tie, or where it is not asked.
        marks: criterion -> (K,) marks from 1 to 5 by shown position.
        note: free text.
    """

    tiers: tuple[tuple[int, ...], ...] = ()
    strength: int | None = None
    marks: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    note: str = ""

    def to_json(self) -> str:
        """In one fixed form: equal entries are equal texts."""
        plain = asdict(self)
        plain["tiers"] = [sorted(tier) for tier in self.tiers]
        return json.dumps(plain, ensure_ascii=False, sort_keys=True)

    @staticmethod
    def of(plain: Any) -> Entry:
        """An entry from JSON that anyone may have sent; raises `InvalidLabelError` where a type is wrong."""
        if not isinstance(plain, dict) or (unknown := sorted(set(plain) - {"tiers", "strength", "marks", "note"})):
            what = f"unknown field `{unknown[0]}`" if isinstance(plain, dict) else "no JSON object"
            raise InvalidLabelError(f"a label with {what}", hint="its fields are tiers, strength, marks and note")
        tiers, marks = plain.get("tiers", []), plain.get("marks", {})
        strength, note = plain.get("strength"), plain.get("note", "")
        if not (isinstance(tiers, list) and all(isinstance(tier, list) and all(map(_whole, tier)) for tier in tiers)):
            raise InvalidLabelError("`tiers` is no list of lists of positions", hint="such as [[2], [0, 1]]")
        if not (strength is None or _whole(strength)):
            raise InvalidLabelError("`strength` is no whole number", hint="give 1 to 4, or null")
        if not (isinstance(marks, dict) and all(map(_marks, marks.values()))):
            raise InvalidLabelError("`marks` is no object of lists of marks", hint='such as {"honest": [5, null]}')
        if not isinstance(note, str):
            raise InvalidLabelError("`note` is no text", hint="leave it out, or give a string")
        return Entry(
            tuple(tuple(sorted(tier)) for tier in tiers),
            strength,
            {str(name): tuple(values) for name, values in sorted(marks.items())},
            note,
        )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _marks(values: Any) -> bool:
    return isinstance(values, list) and all(value is None or _whole(value) for value in values)


@dataclass(frozen=True)
class LabelPlan:
    """How a set of items is to be labeled; `stages/label/human_settings.py` explains each.

    Attributes:
        overlap: labels an item needs.
        criteria: names of the marks each answer gets.
        strengths: ask how much better, of two answers.
        repeat_share: of hidden repeats.
        gold_share: of gold items.
        set_aside_after: skips and flags by different people after which an item is asked of nobody else.
        enough: share of the items that has to be done.
        seed: of orders, repeats and gold.
        guidelines: their text, None without any.
    """

    overlap: int = 1
    criteria: tuple[str, ...] = ()
    strengths: bool = False
    repeat_share: float = 0.0
    gold_share: float = 0.0
    set_aside_after: int = 1
    enough: float = 1.0
    seed: int = 0
    guidelines: str | None = None

    @property
    def guidelines_hash(self) -> str | None:
        """SHA-256 of the guidelines."""
        return None if self.guidelines is None else hashlib.sha256(self.guidelines.encode()).hexdigest()

    @cached_property
    def shown(self) -> str:
        """Hash of what a face shows of this plan: guidelines, criteria and whether strengths are asked for."""
        text = json.dumps([self.guidelines, self.criteria, self.strengths])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(self, entry: Entry, count: int) -> None:
        """Raise `InvalidLabelError` unless an entry is a whole label of `count` answers."""
        placed = [position for tier in entry.tiers for position in tier]
        names = ANSWER_LETTERS
        if outside := [position for position in placed if not 0 <= position < count]:
            raise InvalidLabelError(f"there is no answer number {outside[0]}: there are {count}")
        if doubled := sorted({position for position in placed if placed.count(position) > 1}):
            raise InvalidLabelError(f"answer {names[doubled[0]]} has two places", hint="give each answer one place")
        if lacking := [names[position] for position in range(count) if position not in placed]:
            which = f"answer {lacking[0]} has" if len(lacking) == 1 else f"answers {', '.join(lacking)} have"
            raise InvalidLabelError(f"{which} no place yet", hint="rank all of them; ties are allowed")
        if not all(entry.tiers):
            raise InvalidLabelError("a place without any answer", hint="leave empty tiers out")
        self._check_strength(entry, count)
        self._check_marks(entry, count)
        check_text(entry.note, "the note", MAX_NOTE)

    def check_draft(self, entry: Entry, count: int) -> None:
        """Raise `InvalidLabelError` for what no label could begin with; it may be unfinished."""
        low, high = MARK_RANGE
        placed = [position for tier in entry.tiers for position in tier]
        if len(set(placed)) < len(placed) or not all(0 <= position < count for position in placed):
            raise InvalidLabelError(f"a draft does not hold each of its answers once, or not of these {count}")
        if entry.strength is not None and not (self.strengths and 1 <= entry.strength <= 4):
            raise InvalidLabelError(f"a draft with the strength {entry.strength}")
        for criterion, marks in entry.marks.items():
            if criterion not in self.criteria or len(marks) > count:
                raise InvalidLabelError(f"a draft with marks of `{printable(criterion)[:30]}` that nobody asks for")
            if not all(mark is None or low <= mark <= high for mark in marks):
                raise InvalidLabelError(f"a draft with a mark that is not from {low} to {high}")
        check_text(entry.note, "the note", MAX_NOTE)

    def _check_strength(self, entry: Entry, count: int) -> None:
        asked = self.strengths and count == 2 and len(entry.tiers) == 2
        if asked and (entry.strength is None or not 1 <= entry.strength <= 4):
            raise InvalidLabelError("how much better is it?", hint="1 (negligibly, unsure) to 4 (significantly)")
        if not asked and entry.strength is not None:
            raise InvalidLabelError("a strength was given where none is asked for", hint="leave it out")

    def _check_marks(self, entry: Entry, count: int) -> None:
        low, high = MARK_RANGE
        if unknown := sorted(set(entry.marks) - set(self.criteria)):
            raise InvalidLabelError(f"no criterion is called `{unknown[0]}`", hint=f"there are: {self.criteria}")
        for criterion in self.criteria:
            marks = entry.marks.get(criterion, ())
            for position in range(count):
                mark = marks[position] if position < len(marks) else None
                if mark is None or not low <= mark <= high:
                    name = ANSWER_LETTERS[position]
                    raise InvalidLabelError(f"mark `{criterion}` of answer {name}", hint=f"from {low} to {high}")
            if len(marks) > count:
                raise InvalidLabelError(f"`{criterion}` has {len(marks)} marks for {count} answers")


def check_text(text: str, what: str, limit: int) -> None:
    """Raise `InvalidLabelError` for text that cannot be stored or is too long."""
    if len(text) > limit:
        raise InvalidLabelError(f"{what} has {len(text):,} characters", hint=f"at most {limit:,} are kept")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidLabelError(f"{what} holds half a character at {error.start}", hint="type it again") from error


@dataclass(frozen=True)
class Annotator:
    """Somebody who labels."""

    id: int
    name: str


@dataclass(frozen=True)
class Task:
    """What one person is asked: one prompt's answers in the order shown to them.

    Attributes:
        id: of the assignment.
        number: how many tasks this person has been given, this one included.
        prompt: what was asked.
        answers: K texts in shown order.
        draft: what was entered so far, or what an undo took back; None if nothing.
        plan: `LabelPlan.shown` of the plan that holds; a face that shows another one reads `LabelSession.plan` again.
        active_seconds: already spent on it.
    """

    id: int
    number: int
    prompt: Prompt
    answers: tuple[str, ...]
    plan: str
    draft: Entry | None = None
    active_seconds: float = 0.0


@dataclass(frozen=True)
class Receipt:
    """Says that an answer is on disk.

    Attributes:
        action: its number in the store.
        task: what it answers.
        is_new: false where the same answer had been given before, as after a lost reply.
    """

    action: int
    task: int
    is_new: bool


@dataclass(frozen=True)
class Progress:
    """How far the labeling is, and one person in it.

    Attributes:
        items: to be labeled.
        done: of them, labeled by as many as needed or set aside.
        set_aside: of those, skipped or flagged too often.
        labels: rankings given, repeats and gold not counted.
        labels_left: that are still needed.
        is_complete: the pipeline can go on.
        mine: answers this person gave, skips, flags, repeats and gold included.
        left_for_me: tasks that this person may still be given, hidden repeats and gold included.
        pace_seconds: median active time of this person's last labels, None before the first.
    """

    items: int
    done: int
    set_aside: int
    labels: int
    labels_left: int
    is_complete: bool
    mine: int = 0
    left_for_me: int = 0
    pace_seconds: float | None = None


@dataclass(frozen=True)
class AnnotatorOverview:
    """One person's work so far, for whoever leads it.

    Attributes:
        name: theirs.
        labels: rankings given, repeats and gold included.
        skipped: tasks passed on.
        flagged: tasks reported.
        active_seconds: in all.
        median_seconds: a label; None before the first.
        last_at: of the last answer, milliseconds since 1970; None before the first.
    """

    name: str
    labels: int
    skipped: int
    flagged: int
    active_seconds: float
    median_seconds: float | None
    last_at: int | None


def item_id(item: Candidates) -> str:
    """Hash of prompt and answers, in whatever order: the same item keeps its labels, whatever run brings it."""
    text = json.dumps([prompt_to_json(item.prompt), sorted(item.completions)], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]
