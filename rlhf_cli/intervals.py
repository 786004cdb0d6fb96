"""Confidence intervals. The bootstrap resamples prompts, since the completions of one prompt are correlated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_DRAWS_AT_ONCE = 2_000_000
_STILL = 1e-18


@dataclass(frozen=True)
class PromptSums:
    """Quantities summed within each prompt; prompts without any of them are omitted.

    Attributes:
        prompts: (N,) indices of the prompts, each once.
        values: (N, M) sums of M quantities.
    """

    prompts: NDArray[np.intp]
    values: NDArray[np.float64]


def resampled_sums(
    columns: Sequence[PromptSums], prompts: int, *, resamples: int, seed: int
) -> list[NDArray[np.float64]]:
    """Totals over sets of prompts drawn with replacement (Efron 1979); all columns use the same draws.

    It adds sums per prompt instead of single pairs, so the work grows with the number of prompts only.

    Args:
        columns: sums per prompt.
        prompts: number of prompts, those without sums included.
        resamples: number of sets of prompts.
        seed: of the draws.

    Returns:
        (resamples, M) for each column.
    """
    totals: list[list[NDArray[np.float64]]] = [[] for _ in columns]
    for times in _times_drawn(prompts, resamples, seed):
        for column, total in zip(columns, totals, strict=True):
            total.append(times[column.prompts].T @ column.values)
    return [np.concatenate(total) for total in totals]


def _times_drawn(prompts: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Yield how often each prompt is in each resample, in chunks: (prompts, some of the resamples)."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // prompts)
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        drawn = generator.integers(prompts, size=(count, prompts))
        drawn += np.arange(count)[:, np.newaxis] * prompts
        times = np.bincount(drawn.ravel(), minlength=count * prompts).reshape(count, prompts)
        yield np.ascontiguousarray(times.T, dtype=np.float64)


def percentiles(values: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """Ends of the central interval that holds the share `level` of the values; NaN values are ignored.

    Args:
        values: (resamples,), not all NaN.
        level: share of the values inside.
    """
    tail = (1.0 - level) / 2
    low, high = np.quantile(values[~np.isnan(values)], [tail, 1.0 - tail]).tolist()
    return low, high


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of sum(numerators) / sum(denominators) over resampled prompts (Efron 1979).

    Args:
        numerators: one per prompt, for example its correctly ordered pairs or its share of wins.
        denominators: one per prompt, for example its pairs; all 1 gives the mean over prompts.
        resamples: number of sets of prompts drawn with replacement.
        seed: of the draws.
        level: share of resamples inside the interval.

    Returns:
        Low and high end.
    """
    values = np.column_stack([numerators, denominators]).astype(np.float64)
    column = PromptSums(np.arange(len(values)), values)
    (sums,) = resampled_sums([column], len(values), resamples=resamples, seed=seed)
    return percentiles(ratios(sums), level)


def ratios(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """First column divided by the second: (resamples, 2) to (resamples,).

    A resample of prompts that have only ties holds no pairs; its ratio is NaN.
    """
    return np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] != 0)


def wilson_interval(share: float, count: float, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927); its width is positive at 0 and 1 too.

    Args:
        share: between 0 and 1.
        count: number of independent observations, or the effective number; above 0.
        level: coverage of the interval.
    """
    z = NormalDist().inv_cdf(0.5 + level / 2)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def worth_of(sums: PromptSums) -> float:
    """Effective number of independent observations behind a share (Korn and Graubard 1998).

    p (1 - p) / var(p), var(p) = n / (n - 1) sum_i (a_i - p b_i)^2 / (sum_i b_i)^2 over n prompts, times (z / t_(n-1))^2
    for the degrees of freedom, and at most the number of observations. If all prompts have the same share, the variance
    is unknown, and each prompt counts once, or less if their sizes differ (Kish 1965).

    Args:
        sums: numerator and denominator, for example pairs won and pairs; the denominators count observations.
    """
    above, below = sums.values[sums.values[:, 1] > 0].T
    total, prompts = float(below.sum()), len(below)
    share = float(above.sum()) / total
    spread = float(((above - share * below) ** 2).sum()) / total**2
    if prompts < 3 or spread < _STILL:
        return total**2 / float((below**2).sum())
    z = NormalDist().inv_cdf(0.975)
    worth = share * (1 - share) * (prompts - 1) / (prompts * spread) * (z / _student(z, prompts - 1)) ** 2
    return min(worth, total)


def _student(z: float, freedom: int) -> float:
    """Quantile of Student's t at the level where the normal quantile is z (Abramowitz and Stegun 1964, 26.7.5)."""
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    return float(np.std(values, ddof=1) / len(values) ** 0.5)
