"""Descriptive statistics of labels, without intervals: counts, pace, habits, distributions."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from rlhf_cli.labeling.label_records import STRENGTHS, LabelRecord
from rlhf_cli.labeling.statistics.agreement import (
    TIE,
    category_counts,
    gwet_ac2,
    krippendorff_alpha,
    mirrored,
    pairwise_agreement,
)
from rlhf_cli.labeling.statistics.report import (
    LEAST_SECONDS_PER_100_CHARACTERS,
    CriterionReport,
    Distribution,
    Estimate,
    Habit,
    LabelCounts,
    Pace,
)
from rlhf_cli.labeling.statistics.table import MARKS, LabelTable

HALF_WIDTH = 0.05
"""Half width of an interval of agreement that is narrow enough to compare with other projects."""
NO_GUIDELINES = "none"
_STRETCHES = 24
_USUAL_SHARE = 0.7


def count_labels(labels: Sequence[LabelRecord], table: LabelTable) -> LabelCounts:
    """Count labels, items and prompts."""
    outcomes = Counter(label.outcome for label in labels)
    purposes = Counter(label.purpose for label in table.labels)
    rows = np.flatnonzero(table.counted)
    items, first, times = np.unique(table.item[rows], return_index=True, return_counts=True)
    prompts = table.prompt[rows[first]]
    return LabelCounts(
        labels=len(labels),
        ranked=outcomes["ranked"],
        ordinary=len(rows),
        repeats=purposes["repeat"],
        gold=purposes["gold"],
        skipped=outcomes["skipped"],
        flagged=outcomes["flagged"],
        replaced=table.replaced,
        reasons=dict(Counter(label.reason or "no reason given" for label in labels if label.outcome != "ranked")),
        items=len(items),
        prompts=len(np.unique(prompts)),
        shared_items=int((times >= 2).sum()),
        shared_prompts=len(np.unique(prompts[times >= 2])),
    )


def prompts_needed(agreement: Estimate) -> int:
    """Number of further prompts that two annotators must rank for an interval of agreement of +- `HALF_WIDTH`.

    Widths shrink with the square root of the number of prompts. Without any, an agreement of 0.7 and one pair per
    prompt are assumed: 1.96^2 x 0.7 x 0.3 / 0.05^2 = 323.
    """
    if agreement.low is None or agreement.high is None:
        return math.ceil(1.96**2 * _USUAL_SHARE * (1 - _USUAL_SHARE) / HALF_WIDTH**2)
    half = (agreement.high - agreement.low) / 2
    return max(0, math.ceil(agreement.prompts * ((half / HALF_WIDTH) ** 2 - 1)))


def pace_of(labels: Sequence[LabelRecord]) -> Pace | None:
    """Time per ranking, of any purpose; None if no time is known."""
    timed = sorted((label for label in labels if _seconds(label) is not None), key=lambda label: label.at)
    ranked = [label for label in timed if label.outcome == "ranked"]
    if not ranked:
        return None
    seconds = np.array([_seconds(label) for label in ranked], dtype=np.float64)
    characters = np.array([sum(map(len, label.completions)) for label in ranked])
    lower, median, upper = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
    total = sum(_seconds(label) or 0.0 for label in timed)
    ends = np.linspace(0, len(seconds), 1 + min(_STRETCHES, math.ceil(len(seconds) / 5))).astype(int).tolist()
    return Pace(
        labels=len(ranked),
        median=median,
        lower=lower,
        upper=upper,
        per_hour=3600 * len(ranked) / total if total else None,
        fast=int((seconds < LEAST_SECONDS_PER_100_CHARACTERS * characters / 100).sum()),
        course=tuple((end, float(np.median(seconds[start:end]))) for start, end in pairwise(ends)),
    )


def _seconds(label: LabelRecord) -> float | None:
    """Active time of a label; None if not measured."""
    known = label.active_seconds
    return known if known is not None and math.isfinite(known) and known >= 0 else None


def habit_of(labels: Sequence[LabelRecord]) -> Habit | None:
    """The most frequent ranking by shown position, for the most frequent number of completions."""
    of_size: dict[int, Counter[tuple[tuple[int, ...], ...]]] = defaultdict(Counter)
    for label in labels:
        if label.outcome == "ranked" and label.shown:
            spot = {index: position for position, index in enumerate(label.shown)}
            order = tuple(tuple(sorted(spot[index] for index in tier)) for tier in label.tiers)
            of_size[len(label.completions)][order] += 1
    if not of_size:
        return None
    orders = max(of_size.values(), key=lambda own: own.total())
    # Ties are broken independently of the order of labels.
    order, times = min(orders.items(), key=lambda own: (-own[1], own[0]))
    return Habit(">".join("=".join(_letter(spot) for spot in tier) for tier in order), times, orders.total())


def _letter(spot: int) -> str:
    return chr(ord("A") + spot) if spot < 26 else str(spot + 1)


def guidelines_of(labels: Sequence[LabelRecord]) -> dict[str, int]:
    """Hash of the guidelines shown -> number of rankings."""
    return dict(Counter(label.guidelines or NO_GUIDELINES for label in labels).most_common())


def unknown_of(labels: Sequence[LabelRecord], table: LabelTable) -> tuple[str, ...]:
    """Sentences that say what cannot be measured because the labels lack it."""
    ranked = len(table.labels)
    hidden = sum(not label.shown for label in table.labels)
    untimed = sum(_seconds(label) is None for label in table.labels)
    sentences = []
    if hidden:
        sentences.append(
            f"{_of_all(hidden, ranked)} have no order of presentation, so they are excluded from first-shown wins, "
            "winning positions and habits"
        )
    if untimed:
        sentences.append(f"{_of_all(untimed, ranked)} have no active time, so they are excluded from the pace")
    if not any(label.purpose == "repeat" for label in labels):
        sentences.append("there are no hidden repeats, so self-consistency is unknown")
    if not any(label.purpose == "gold" for label in labels):
        sentences.append("there are no gold items, so accuracy is unknown")
    return tuple(sentences)


def _of_all(count: int, everything: int) -> str:
    return "all labels" if count == everything else f"{count:,} of {everything:,} labels"


def distribution_of(table: LabelTable) -> Distribution:
    """Distributions of ordinary labels."""
    labels = [table.labels[row] for row in np.flatnonzero(table.counted).tolist()]
    won: dict[int, np.ndarray] = {}
    for label in labels:
        if label.shown and label.tiers:
            size, best = len(label.completions), label.tiers[0]
            shares = won.setdefault(size, np.zeros(size))
            for index in best:
                shares[label.shown.index(index)] += 1 / len(best)
    strengths = Counter(label.strength for label in labels if label.strength is not None)
    return Distribution(
        completions=dict(sorted(Counter(len(label.completions) for label in labels).items())),
        tiers=dict(sorted(Counter(len(label.tiers) for label in labels).items())),
        winners={size: tuple((shares / shares.sum()).tolist()) for size, shares in sorted(won.items())},
        strengths={degree: strengths[degree] for degree in range(1, len(STRENGTHS) + 1)} if strengths else {},
        criteria=_criteria(labels),
    )


def _criteria(labels: Sequence[LabelRecord]) -> dict[str, CriterionReport]:
    """Marks per criterion; the unit of agreement is a completion of an item."""
    given: dict[str, dict[tuple[str, int], np.ndarray]] = defaultdict(dict)
    for label in labels:
        for name, marks in label.marks.items():
            for index, mark in enumerate(marks):
                if mark is not None:
                    given[name].setdefault((label.item, index), np.zeros(MARKS, dtype=np.int64))[mark - 1] += 1
    return {name: _criterion(np.array(list(completions.values()))) for name, completions in sorted(given.items())}


def _criterion(counts: np.ndarray) -> CriterionReport:
    units = int((counts.sum(axis=1) >= 2).sum())
    agreement, alpha = pairwise_agreement(counts), krippendorff_alpha(counts, "ordinal")
    one, two, three, four, five = counts.sum(axis=0).tolist()
    return CriterionReport(
        marks=(one, two, three, four, five),
        agreement=Estimate(agreement.value, count=units, missing=agreement.missing),
        alpha=Estimate(alpha.value, count=units, missing=alpha.missing),
    )


def strength_agreement(table: LabelTable) -> Estimate:
    """Gwet's AC2, quadratic weights, on a scale from `a significantly better`, tie, to `b significantly better`."""
    degrees = len(STRENGTHS)
    rows = [row for row in np.flatnonzero(table.counted).tolist() if table.labels[row].strength is not None]
    if not rows:
        return Estimate(missing="no label has a strength")
    spot: dict[int, int] = {}
    ratings: dict[int, list[int | None]] = defaultdict(lambda: [None] * len(rows))
    for row in rows:
        unit = spot.setdefault(int(table.item[row]), len(spot))
        side = int(table.verdict[table.start[row]]) - TIE
        ratings[int(table.annotator[row])][unit] = degrees + side * (table.labels[row].strength or 0)
    counts = category_counts(list(ratings.values()), 2 * degrees + 1)
    found = gwet_ac2(mirrored(counts))
    return Estimate(found.value, count=int((counts.sum(axis=1) >= 2).sum()), missing=found.missing)
