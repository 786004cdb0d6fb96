"""Checks over a whole source: contradictions, annotators who answered twice, prompts on both sides of a split."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterable

from rlhf_cli.data.records import Ranking, Record, prompt_key


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
