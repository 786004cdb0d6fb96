"""Checks over a whole source: contradictions, rankings that an annotator repeated, prompts on both sides of a split."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Container
from dataclasses import replace

from rlhf_cli.data.records import Candidates, Ranking, Record, prompt_key, split_key
from rlhf_cli.data.splits import Split, question
from rlhf_cli.data.warnings import WarningLog


def hash64(*texts: str) -> int:
    """64 bits of SHA-256: among ten million values two collide with probability 3e-6, rare enough for a warning."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return int.from_bytes(digest.digest()[:8], "big")


class RankingChecks:
    """Finds pairs ranked both ways and items that one annotator ranked twice.

    Memory: eight bytes per ranked pair; about 300 bytes per record with an annotator, since a later one replaces it.
    """

    def __init__(self) -> None:
        self._pairs = array("Q")
        self._of_annotator: dict[int, list[int]] = {}
        self.repeats = 0

    def add(self, ranking: Ranking) -> None:
        """Add one record."""
        pairs = _ordered_pairs(ranking)
        if ranking.annotator is None:
            self._pairs.extend(pairs)
            return
        key = annotation_key(ranking)
        self.repeats += key in self._of_annotator
        self._of_annotator[key] = pairs

    def contradictions(self) -> int:
        """Pairs of completions of one prompt that are ranked both ways."""
        ordered = self._pairs[:]
        for later in self._of_annotator.values():
            ordered.extend(later)
        if not ordered:
            return 0
        import numpy as np

        distinct = np.unique(np.frombuffer(ordered, dtype=np.uint64))
        pairs = distinct >> np.uint64(1)
        return int((pairs[1:] == pairs[:-1]).sum())

    def report(self, warnings: WarningLog) -> None:
        """Add what was found to the warnings of the source."""
        warnings.add("contradictions", count=self.contradictions())
        warnings.add("annotator repeats", count=self.repeats)


def annotation_key(ranking: Ranking) -> int:
    """Key that all rankings of the same completions by the same annotator share, in any order of the completions."""
    return hash64(str(ranking.annotator), prompt_key(ranking.prompt), *sorted(ranking.completions))


def latest_annotations(rankings: list[Ranking]) -> list[Ranking]:
    """Drop the rankings that their own annotator repeated later."""
    last = {annotation_key(ranking): index for index, ranking in enumerate(rankings) if ranking.annotator is not None}
    return [
        ranking
        for index, ranking in enumerate(rankings)
        if ranking.annotator is None or last[annotation_key(ranking)] == index
    ]


def _ordered_pairs(ranking: Ranking) -> list[int]:
    """One number per strict pair: a hash of the two completions, whose last bit says which one won."""
    prompt = prompt_key(ranking.prompt)
    pairs = []
    for better, worse in itertools.combinations(ranking.tiers, 2):
        for winner, loser in itertools.product(better, worse):
            first, second = sorted((ranking.completions[winner], ranking.completions[loser]))
            won_first = ranking.completions[winner] == first
            pairs.append(hash64(prompt, first, second) & ~1 | won_first)
    return pairs


class CandidateChecks:
    """Counts records with the prompt and completions of an earlier record, in any order of the completions.

    Memory: eight bytes per record.
    """

    def __init__(self) -> None:
        self._keys = array("Q")

    def add(self, candidates: Candidates) -> None:
        """Add one record."""
        self._keys.append(candidates_key(candidates))

    @property
    def repeats(self) -> int:
        """Number of records that repeat an earlier one."""
        if not self._keys:
            return 0
        import numpy as np

        return len(self._keys) - int(np.unique(np.frombuffer(self._keys, dtype=np.uint64)).size)

    def report(self, warnings: WarningLog) -> None:
        """Add what was found to the warnings of the source."""
        warnings.add("candidate repeats", count=self.repeats)


def candidates_key(candidates: Candidates) -> int:
    """Key that all records with the same prompt and completions share, in any order of the completions."""
    return hash64(prompt_key(candidates.prompt), *sorted(candidates.completions))


def distinct_candidates(records: list[Candidates]) -> list[Candidates]:
    """Keep the first record of each prompt and set of completions.

    Its known order is the one that all of these records agree on; None if they disagree or none knows it.
    """
    first: dict[int, Candidates] = {}
    orders: dict[int, set[tuple[frozenset[str], ...]]] = {}
    for record in records:
        key = candidates_key(record)
        kept = first.setdefault(key, record)
        if record.known is None:
            continue
        seen = orders.setdefault(key, set())
        seen.add(tuple(frozenset(record.completions[index] for index in tier) for tier in record.known))
        known = None
        if len(seen) == 1:
            position = {completion: index for index, completion in enumerate(kept.completions)}
            known = tuple(tuple(position[record.completions[index]] for index in tier) for tier in record.known)
        first[key] = replace(kept, known=known)
    return list(first.values())


class PromptKeys:
    """The `split_key` of every prompt of a source, in eight bytes per record."""

    def __init__(self) -> None:
        self._keys = array("Q")

    def __len__(self) -> int:
        """Number of records."""
        return len(self._keys)

    def add(self, record: Record) -> None:
        """Add one record; plain text without a prompt counts by the text itself."""
        self._keys.append(int(split_key(question(record)), 16))

    def count_in(self, trained: Container[str]) -> int:
        """Return the number of distinct prompts whose `split_key` is in `trained`."""
        return sum(f"{key:016x}" in trained for key in set(self._keys))

    def in_training_of(self, other: PromptKeys, split: Split) -> int:
        """Number of distinct prompts that are also in `other` and not held out there."""
        import numpy as np

        if not self._keys or not other._keys:
            return 0
        ours, theirs = (np.frombuffer(held._keys, dtype=np.uint64) for held in (self, other))
        common = np.intersect1d(ours, theirs).tolist()
        return sum(not split.holds_out_key(f"{key:016x}") for key in common)
