"""Difference of two groups of runs that differ in their seeds, scored on the same prompts.

A score varies with the prompt and with the seed of the training run. Which of them an interval includes decides what it
says: these models on other prompts, other training runs on these prompts, or both. The design is crossed: every run is
scored on every prompt. Its variance components are those of a two-way analysis of variance with random effects
(Cornfield and Tukey 1956), and the degrees of freedom of their sum are Satterthwaite's (1946).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.intervals import Measure, student_quantile
from rlhf_cli.statistics.paired import NO_SPREAD

Scores = NDArray[np.float64]
"""(S, P): score of each run on each prompt."""


@dataclass(frozen=True)
class GroupDifference:
    """Difference of the mean scores of two groups of runs.

    Attributes:
        first: mean of the first group.
        second: mean of the second group.
        prompts: second - first, with the interval over prompts: the same models on other prompts.
        seeds: the same difference, with the interval over seeds: other training runs on the same prompts.
        both: the same difference, with the interval over both.
    """

    first: float
    second: float
    prompts: Measure
    seeds: Measure
    both: Measure


@dataclass(frozen=True)
class _Variance:
    """Variance of an estimate, and the degrees of freedom with which it was estimated."""

    value: float
    freedom: float


def group_difference(first: Scores, second: Scores, *, is_paired: bool, level: float = 0.95) -> GroupDifference:
    """Compare two groups of runs on the same prompts.

    Args:
        first: of the first group.
        second: of the second group, on the same prompts in the same order.
        is_paired: run i of both groups has the same seed, so the difference of each pair counts.
        level: coverage of the intervals.

    Returns:
        The difference; without an interval where there are fewer than two prompts or runs.
    """
    prompts = first.shape[1]
    difference = float(second.mean() - first.mean())
    if is_paired:
        rows = second - first
        over_prompts, over_seeds, rest = _crossed(rows)
    else:
        over_prompts = _of_mean(second.mean(axis=0) - first.mean(axis=0))
        components = [_crossed(scores) for scores in (first, second)]
        over_seeds = _sum([seeds for _, seeds, _ in components])
        rest = _sum([residual for _, _, residual in components])
    runs = min(len(first), len(second))
    few_prompts = None if prompts > 1 else "there is one prompt"
    few_runs = None if runs > 1 else "there is one run per group" if is_paired else "a group has one run"
    over_both = _total(over_prompts, over_seeds, rest)
    return GroupDifference(
        first=float(first.mean()),
        second=float(second.mean()),
        prompts=_measure(difference, over_prompts, prompts, few_prompts, level),
        seeds=_measure(difference, over_seeds, runs, few_runs, level),
        both=_measure(difference, over_both, runs, few_runs or few_prompts, level),
    )


def _crossed(rows: Scores) -> tuple[_Variance, _Variance, _Variance]:
    """Return the variance of the mean of all entries by prompts, by runs, and by what is left, which both contain."""
    runs, prompts = rows.shape
    residual = rows - rows.mean(axis=0) - rows.mean(axis=1, keepdims=True) + rows.mean()
    freedom = (runs - 1) * (prompts - 1)
    left = float((residual**2).sum()) / freedom / (runs * prompts) if freedom else 0.0
    return _of_mean(rows.mean(axis=0)), _of_mean(rows.mean(axis=1)), _Variance(left, freedom)


def _of_mean(values: NDArray[np.float64]) -> _Variance:
    count = len(values)
    return _Variance(float(values.var(ddof=1)) / count if count > 1 else 0.0, count - 1)


def _sum(parts: list[_Variance]) -> _Variance:
    """Add variances of independent estimates (Welch 1947)."""
    return _Variance(sum(part.value for part in parts), _freedom(parts, sum(part.value for part in parts)))


def _total(prompts: _Variance, seeds: _Variance, rest: _Variance) -> _Variance:
    """Return the variance over prompts and seeds; `rest` is in both and counts once.

    It is at least each of the two, which an estimate by subtraction need not be.
    """
    value = prompts.value + seeds.value - rest.value
    larger = max(prompts, seeds, key=lambda part: part.value)
    return _Variance(value, _freedom([prompts, seeds, rest], value)) if value > larger.value else larger


def _freedom(parts: list[_Variance], value: float) -> float:
    """Satterthwaite's degrees of freedom of a sum or difference of independent mean squares."""
    spread = sum(part.value**2 / part.freedom for part in parts if part.value)
    return max(1.0, value**2 / spread) if spread else 1.0


def _measure(difference: float, variance: _Variance, n: int, missing: str | None, level: float) -> Measure:
    if missing is None and not variance.value:
        missing = NO_SPREAD
    if missing is not None:
        return Measure(difference, None, None, n, missing)
    reach = student_quantile(1.0 - (1.0 - level) / 2, variance.freedom) * variance.value**0.5
    return Measure(difference, difference - reach, difference + reach, n)
