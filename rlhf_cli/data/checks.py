"""Checks over a whole source: contradictions, annotators who answered twice, prompts on both sides of a split."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterable
from dataclasses import replace

from rlhf_cli.data.records import Candidates, Ranking, Record, prompt_key


def hash64(*texts: str) -> int:
    """64 bits of SHA-256. Among ten million values two collide with probability 3e-6, which a warning may bear."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return int.from_bytes(digest.digest()[:8], "big")


class RankingChecks:
    """Finds pairs ranked both ways and items that one annotator ranked twice.

    Memory: eight bytes a ranked pair; of records with an annotator about 300 bytes, since a later one replaces them.
    """

    def __init__(self) -> None:
        self._verdicts = array("Q")
        self._of_annotator: dict[int, list[int]] = {}
        self.repeats = 0

    def add(self, ranking: Ranking) -> None:
        """Take in one more."""
        verdicts = _verdicts(ranking)
        if ranking.annotator is None:
            self._verdicts.extend(verdicts)
            return
        key = annotation_key(ranking)
        self.repeats += key in self._of_annotator
        self._of_annotator[key] = verdicts

    def contradictions(self) -> int:
        """Pairs of completions of one prompt that are ranked both ways."""
        verdicts = self._verdicts[:]
        for later in self._of_annotator.values():
            verdicts.extend(later)
        if not verdicts:
            return 0
        import numpy as np

        distinct = np.unique(np.frombuffer(verdicts, dtype=np.uint64))
        pairs = distinct >> np.uint64(1)
        return int((pairs[1:] == pairs[:-1]).sum())

    def warnings(self, source: str) -> list[str]:
        """One line each, with its count."""
        found = []
        if count := self.contradictions():
            found.append(
                f"{source}: {count:,} pair{'s' if count > 1 else ''} of completions ranked both ways (a > b and b > a) "
                "for the same prompt; all verdicts are kept"
            )
        if self.repeats:
            found.append(
                f"{source}: {self.repeats:,} record{'s' if self.repeats > 1 else ''} by an annotator who ranked the "
                "same completions again later; the latest is used"
            )
        return found


def annotation_key(ranking: Ranking) -> int:
    """The same for all rankings of the same completions by the same annotator, in whatever order they stand."""
    return hash64(str(ranking.annotator), prompt_key(ranking.prompt), *sorted(ranking.completions))


def latest_annotations(rankings: list[Ranking]) -> list[Ranking]:
    """Without those that their own annotator ranked again later."""
    last = {annotation_key(ranking): index for index, ranking in enumerate(rankings) if ranking.annotator is not None}
    return [
        ranking
        for index, ranking in enumerate(rankings)
        if ranking.annotator is None or last[annotation_key(ranking)] == index
    ]


def _verdicts(ranking: Ranking) -> list[int]:
    """One number a strict pair: a hash of the two completions, its last bit the winner's side."""
    prompt = prompt_key(ranking.prompt)
    verdicts = []
    for better, worse in itertools.combinations(ranking.tiers, 2):
        for winner, loser in itertools.product(better, worse):
            first, second = sorted((ranking.completions[winner], ranking.completions[loser]))
            won_first = ranking.completions[winner] == first
            verdicts.append(hash64(prompt, first, second) & ~1 | won_first)
    return verdicts


class CandidateChecks:
    """Counts answers that stand in a source more than once; the order in which they stand does not matter.

    Memory: eight bytes a record.
    """

    def __init__(self) -> None:
        self._keys = array("Q")

    def add(self, candidates: Candidates) -> None:
        """Take in one more."""
        self._keys.append(candidates_key(candidates))

    @property
    def repeats(self) -> int:
        """Records beyond the first of the same prompt and answers."""
        if not self._keys:
            return 0
        import numpy as np

        return len(self._keys) - int(np.unique(np.frombuffer(self._keys, dtype=np.uint64)).size)

    def warnings(self, source: str) -> list[str]:
        """One line with the count, if there are any."""
        if not (count := self.repeats):
            return []
        what = "records repeat" if count > 1 else "record repeats"
        return [f"{source}: {count:,} {what} a prompt and answers that are there already; each is used once"]


def candidates_key(candidates: Candidates) -> int:
    """The same for the same answers to the same prompt, in whatever order they stand."""
    return hash64(prompt_key(candidates.prompt), *sorted(candidates.completions))


def distinct_candidates(records: list[Candidates]) -> list[Candidates]:
    """Each prompt and answers once, where they first stand.

    What is known of their order is what all say that say anything; where two say different things, nothing is known.
    """
    first: dict[int, Candidates] = {}
    orders: dict[int, set[tuple[frozenset[str], ...]]] = {}
    for record in records:
        key = candidates_key(record)
        kept = first.setdefault(key, record)
        if record.known is None:
            continue
        said = orders.setdefault(key, set())
        said.add(tuple(frozenset(record.completions[index] for index in tier) for tier in record.known))
        known = None
        if len(said) == 1:
            place = {answer: index for index, answer in enumerate(kept.completions)}
            known = tuple(tuple(place[record.completions[index]] for index in tier) for tier in record.known)
        first[key] = replace(kept, known=known)
    return list(first.values())


class PromptSet:
    """The prompts of a source, as eight bytes a record."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def add(self, record: Record) -> None:
        """Take in one more."""
        text = getattr(record, "completion", "") if record.prompt == "" else ""
        self._hashes.append(hash64(prompt_key(record.prompt), text))

    def in_common(self, other: PromptSet) -> int:
        """Distinct prompts that both hold."""
        import numpy as np

        if not self._hashes or not other._hashes:
            return 0
        mine, theirs = (np.frombuffer(held._hashes, dtype=np.uint64) for held in (self, other))
        return int(np.intersect1d(mine, theirs).size)


def prompt_set(records: Iterable[Record]) -> PromptSet:
    """The prompts of some records."""
    prompts = PromptSet()
    for record in records:
        prompts.add(record)
    return prompts


def overlap_warning(
    train: PromptSet | Iterable[Record],
    evaluation: PromptSet | Iterable[Record],
    *,
    names: tuple[str, str] = ("training", "evaluation"),
) -> str | None:
    """A warning where prompts are trained on and evaluated on, else None.

    Args:
        train: records, or the `prompts` of a `ValidationReport`.
        evaluation: the same.
        names: of the two sources.
    """
    mine, theirs = (held if isinstance(held, PromptSet) else prompt_set(held) for held in (train, evaluation))
    count = mine.in_common(theirs)
    if not count:
        return None
    return (
        f"{count:,} prompt{'s' if count > 1 else ''} in both {names[0]} and {names[1]}: figures there flatter the model"
    )
