"""Labels as arrays of compared pairs of completions, for fast counting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.data.records import prompt_key
from rlhf_cli.errors import DataError
from rlhf_cli.intervals import PromptSums
from rlhf_cli.labeling.label_records import STRENGTHS, LabelRecord
from rlhf_cli.labeling.statistics.agreement import pair_indices, verdicts

Ints = NDArray[np.intp]
MARKS = 5
"""Highest mark; the lowest is 1."""


@dataclass(frozen=True)
class LabelTable:
    """L labels with a ranking, in order of time, and their V pairs of completions.

    A pair (a, b) has a < b in the order of the item. The pairs of a label are contiguous, in the order of
    `pair_indices`, so two labels of one item have their pairs in the same order.

    Attributes:
        labels: L labels, all ranked.
        names: annotators, sorted.
        annotator: (L,) indices into `names`.
        item: (L,) item numbers.
        prompt: (L,) prompt numbers; items may share one.
        prompts: number of prompts.
        start: (L,) first pair of each label.
        size: (L,) number of pairs of each label.
        verdict: (V,) `A_WINS`, `TIE` or `B_WINS`.
        earlier: (V,) 1 if a was shown before b, -1 if after, 0 if unknown.
        longer: (V,) 1 if a has more characters than b, -1 if fewer, 0 if equally many.
        counted: (L,) whether it is an annotator's one ordinary label of its item (not a repeat, not gold).
        replaced: number of ordinary labels that their annotator gave again later.
    """

    labels: list[LabelRecord]
    names: list[str]
    annotator: Ints
    item: Ints
    prompt: Ints
    prompts: int
    start: Ints
    size: Ints
    verdict: NDArray[np.int8]
    earlier: NDArray[np.int8]
    longer: NDArray[np.int8]
    counted: NDArray[np.bool_]
    replaced: int

    def pairs(self, labels: Ints) -> tuple[Ints, Ints]:
        """All pairs of some labels: for each pair its index in `labels`, and its number in the table."""
        size = self.size[labels]
        owner = np.repeat(np.arange(len(labels)), size)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(size) - size, size)
        return owner, self.start[labels][owner] + within

    def by_prompt(self, labels: Ints, values: NDArray[np.float64]) -> PromptSums:
        """Sums per prompt of (N, M) values that belong to N labels."""
        (column,) = self.by_annotator(labels, np.zeros(len(labels), dtype=np.intp), values, 1)
        return column

    def by_annotator(
        self, labels: Ints, annotators: Ints, values: NDArray[np.float64], count: int | None = None
    ) -> list[PromptSums]:
        """Sums per prompt, for each annotator.

        Args:
            labels: (N,) label of each value.
            annotators: (N,) annotator of each value.
            values: (N, M).
            count: number of annotators; default: all names.
        """
        key, position = np.unique(annotators * self.prompts + self.prompt[labels], return_inverse=True)
        sums = np.zeros((len(key), values.shape[1]))
        for column, one in enumerate(values.T):
            sums[:, column] = np.bincount(position, weights=one, minlength=len(key))
        ends = np.searchsorted(key, np.arange((len(self.names) if count is None else count) + 1) * self.prompts)
        return [PromptSums(key[low:high] % self.prompts, sums[low:high]) for low, high in pairwise(ends)]

    def shared(self) -> tuple[Ints, Ints]:
        """All pairs of ordinary labels of one item by two annotators."""
        rows = np.flatnonzero(self.counted)
        rows = rows[np.argsort(self.item[rows], kind="stable")]
        items, begin, count = np.unique(self.item[rows], return_index=True, return_counts=True)
        first, second = [np.zeros(0, dtype=np.intp)], [np.zeros(0, dtype=np.intp)]
        for size in np.unique(count[count >= 2]) if len(items) else ():
            group = begin[count == size][:, np.newaxis]
            one, other = pair_indices(int(size))
            first.append(rows[(group + one).ravel()])
            second.append(rows[(group + other).ravel()])
        return np.concatenate(first), np.concatenate(second)

    def repeats(self) -> tuple[Ints, Ints]:
        """Hidden repeats, and the earlier label of the same item by the same annotator."""
        own: dict[tuple[int, int], int] = {}
        found = []
        for row, label in enumerate(self.labels):
            key = int(self.annotator[row]), int(self.item[row])
            if label.purpose != "repeat":
                own[key] = row
            elif key in own:
                found.append((row, own[key]))
        pairs = np.array(found, dtype=np.intp).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]


def table_of(labels: Sequence[LabelRecord]) -> LabelTable:
    """Convert the labels that have a ranking.

    Raises:
        DataError: a ranking or an order of presentation does not hold each completion once, a mark or strength is out
            of range, or the labels of one item have different completions.
    """
    ranked = sorted((label for label in labels if label.outcome == "ranked"), key=lambda label: label.at)
    names = sorted({label.annotator for label in labels})
    number_of = {name: number for number, name in enumerate(names)}
    items: dict[str, tuple[int, int]] = {}
    prompts: dict[str, int] = {}
    completions: dict[str, tuple[str, ...]] = {}
    item_rows: list[int] = []
    prompt_rows: list[int] = []
    for label in ranked:
        _check_degrees(label)
        if label.item not in items:
            completions[label.item] = label.completions
            items[label.item] = len(items), prompts.setdefault(prompt_key(label.prompt), len(prompts))
        elif completions[label.item] != label.completions:
            raise DataError(
                f"item {label.item!r} has other completions in the label by {label.annotator!r} than before"
            )
        item, prompt = items[label.item]
        item_rows.append(item)
        prompt_rows.append(prompt)
    last: dict[tuple[str, str], int] = {}
    ordinary = [row for row, label in enumerate(ranked) if label.purpose == "label"]
    for row in ordinary:
        last[ranked[row].annotator, ranked[row].item] = row
    counted = np.zeros(len(ranked), dtype=bool)
    counted[list(last.values())] = True
    return LabelTable(
        labels=ranked,
        names=names,
        annotator=np.array([number_of[label.annotator] for label in ranked], dtype=np.intp),
        item=np.array(item_rows, dtype=np.intp),
        prompt=np.array(prompt_rows, dtype=np.intp),
        prompts=len(prompts),
        counted=counted,
        replaced=len(ordinary) - len(last),
        **_pairs(ranked),
    )


def _check_degrees(label: LabelRecord) -> None:
    """Raise `DataError` for a strength or a mark that is out of range."""
    if label.strength is not None and not 1 <= label.strength <= len(STRENGTHS):
        raise DataError(
            f"the label of item {label.item!r} by {label.annotator!r}: `strength` is {label.strength}; 1 to "
            f"{len(STRENGTHS)} is expected"
        )
    for name, marks in label.marks.items():
        if any(mark is not None and not 1 <= mark <= MARKS for mark in marks):
            raise DataError(
                f"the label of item {label.item!r} by {label.annotator!r}: marks of {name!r} are {list(marks)}; 1 to "
                f"{MARKS} is expected"
            )


def levels_of(label: LabelRecord, tiers: Sequence[Sequence[int]]) -> list[int]:
    """Tier of each completion, 0 is best: (K,).

    Raises:
        DataError: `tiers` does not hold each completion once.
    """
    completions = len(label.completions)
    if sorted(chain.from_iterable(tiers)) != list(range(completions)):
        raise DataError(
            f"the label of item {label.item!r} by {label.annotator!r}: each of the {completions} completions is "
            f"expected once; got {[list(tier) for tier in tiers]}"
        )
    levels = [0] * completions
    for level, tier in enumerate(tiers):
        for index in tier:
            levels[index] = level
    return levels


def _pairs(labels: Sequence[LabelRecord]) -> dict[str, NDArray]:
    """The pair columns of `LabelTable`, and where each label's pairs begin."""
    completions = np.array([len(label.completions) for label in labels], dtype=np.intp)
    size = completions * (completions - 1) // 2
    start = np.cumsum(size) - size
    columns = {name: np.zeros(int(size.sum()), dtype=np.int8) for name in ("verdict", "earlier", "longer")}
    for count in np.unique(completions):
        rows = np.flatnonzero(completions == count)
        chosen = [labels[row] for row in rows.tolist()]
        first, second = pair_indices(int(count))
        positions = (start[rows][:, np.newaxis] + np.arange(len(first))).ravel()
        levels = np.array([levels_of(label, label.tiers) for label in chosen])
        shown = np.array([_places_shown(label) for label in chosen])
        lengths = np.array([[len(text) for text in label.completions] for label in chosen])
        columns["verdict"][positions] = verdicts(levels).ravel()
        columns["earlier"][positions] = np.sign(shown[:, second] - shown[:, first]).ravel()
        columns["longer"][positions] = np.sign(lengths[:, first] - lengths[:, second]).ravel()
    return {"start": start, "size": size, **columns}


def _places_shown(label: LabelRecord) -> list[int]:
    """Position at which each completion was shown: (K,); all 0 if unknown."""
    return levels_of(label, [(index,) for index in label.shown]) if label.shown else [0] * len(label.completions)
