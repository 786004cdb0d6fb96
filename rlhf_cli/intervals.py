"""Confidence intervals over prompts: completions of one prompt are correlated, so prompts are the units."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DRAWS_AT_ONCE = 2_000_000
_STILL = 1e-18
_CONVERGED = 1e-12
ENOUGH_PROMPTS = 100
"""Prompts whose share has an interval of about +-10 points, if each counts once."""


@dataclass(frozen=True)
class Measure:
    """A figure with its interval, of 95 % unless its owner says otherwise.

    Attributes:
        value: the estimate; None if there is none.
        low: low end; None if there is no interval.
        high: high end; None if there is no interval.
        n: number of independent observations behind it, in general prompts.
        missing: why there is no value or no interval.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    missing: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return `{value, low, high, n}`, and `missing` if there is a reason; figures that are not finite are null."""
        plain: dict[str, Any] = {"value": finite(self.value), "low": finite(self.low), "high": finite(self.high)}
        return plain | {"n": self.n} | ({"missing": self.missing} if self.missing else {})


def percent(share: float | None) -> str:
    """Return a share as tables, pages, cards and sentences write it, such as "83.7%"; "not known" without one."""
    return "not known" if share is None else f"{share:z.1%}"


def percent_span(low: float | None, high: float | None) -> str:
    """Return the interval of a share, such as "77.9% to 88.4%"; "not known" without one."""
    return "not known" if low is None or high is None else f"{percent(low)} to {percent(high)}"


def finite(value: float | None) -> float | None:
    """Return a number that JSON can hold, else None."""
    return value if value is not None and math.isfinite(value) else None


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


def share_interval(
    numerators: Sequence[float], denominators: Sequence[float], level: float = 0.95
) -> tuple[float, float]:
    """Interval of sum(numerators) / sum(denominators), a share of observations that are grouped by prompt.

    `jeffreys_interval` with the effective number of observations (Korn and Graubard 1998). A percentile bootstrap is
    too narrow for few prompts: it contains a share of 0.9 of 10 prompts in 64 % of data sets, and it has no width if
    all prompts were won.

    Args:
        numerators: one per prompt, between 0 and its denominator, for example its correctly ordered pairs.
        denominators: one per prompt, for example its pairs; not all 0.
        level: coverage of the interval.

    Returns:
        Low and high end.
    """
    values = np.column_stack([numerators, denominators]).astype(np.float64)
    above, below = values.sum(axis=0).tolist()
    worth = worth_of(PromptSums(np.arange(len(values)), values), level)
    return jeffreys_interval(min(1.0, above / below), worth, level)


def joint_level(comparisons: int, level: float = 0.95) -> float:
    """Coverage of each of several intervals that together hold all their true values with probability `level`.

    1 - (1 - level) / m, by Bonferroni's inequality (Dunn 1961), whatever the dependence between the intervals.

    Args:
        comparisons: number m of intervals, at least 1.
        level: that all of them shall have together.
    """
    return 1.0 - (1.0 - level) / comparisons


def jeffreys_interval(share: float, count: float, level: float = 0.95) -> tuple[float, float]:
    """Interval that contains the true share about as often as `level` says.

    Quantiles of the posterior with Jeffreys' prior, Beta(won + 1/2, lost + 1/2), modified near 0 and 1 (Brown, Cai and
    DasGupta 2001, section 4.1.2): it reaches 0 or 1 where at most one observation is won or lost; where none is, the
    other end is that of the exact interval of Clopper and Pearson 1934. That one contains the truth at least as often
    as it says everywhere, so in general more often, and is wider; docs/evaluation.md compares them.

    Args:
        share: between 0 and 1.
        count: number of independent observations, or their effective number, which need not be whole; above 0.
        level: coverage of the interval.
    """
    tail, won = (1.0 - level) / 2, share * count
    lost = count - won
    low = _beta_quantile(tail, count - max(lost, 0.5) + 0.5, max(lost, 0.5) + 0.5) if won > 1 or lost < _STILL else 0.0
    high = (
        _beta_quantile(1.0 - tail, max(won, 0.5) + 0.5, count - max(won, 0.5) + 0.5)
        if lost > 1 or won < _STILL
        else 1.0
    )
    return low, high


def half_width(prompts: int, level: float = 0.95) -> float:
    """Half of the width of `share_interval` if each of `prompts` prompts counts once and half of them are won."""
    low, high = jeffreys_interval(0.5, prompts, level)
    return (high - low) / 2


def mean_interval(values: Sequence[float] | NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of independent values; without width for a single value."""
    mean, error = float(np.mean(values)), standard_error(values)
    if len(values) < 2:
        return mean, mean
    reach = student_quantile(1.0 - (1.0 - level) / 2, len(values) - 1) * error
    return mean - reach, mean + reach


def _beta_quantile(share: float, a: float, b: float) -> float:
    """Where the distribution function of Beta(a, b) reaches `share`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _beta_distribution(middle, a, b) < share else (low, middle)
    return (low + high) / 2


def _beta_distribution(x: float, a: float, b: float) -> float:
    """I_x(a, b), the distribution function of Beta(a, b) at 0 < x < 1.

    The continued fraction of Abramowitz and Stegun 1964 (26.5.8), evaluated forward (Lentz 1976). It converges fast
    below the mean; above it the symmetry I_x(a, b) = 1 - I_(1-x)(b, a) is used (26.5.2).
    """
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _beta_distribution(1.0 - x, b, a)
    fraction = numerator = 1.0
    denominator = 0.0
    for term in _beta_terms(x, a, b):
        denominator = 1.0 / (1.0 + term * denominator)
        numerator = 1.0 + term / numerator
        fraction *= numerator * denominator
        if abs(numerator * denominator - 1.0) < _CONVERGED:
            break
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / a / fraction


def _beta_terms(x: float, a: float, b: float) -> Iterator[float]:
    """Yield the numerators d_1, d_2, ... of the continued fraction."""
    for m in itertools.count():
        yield -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        yield (m + 1) * (b - m - 1) * x / ((a + 2 * m + 1) * (a + 2 * m + 2))


def is_undecided(low: float, high: float) -> bool:
    """Whether an interval contains 1/2, so that the data do not say which of the two sides is better."""
    return low <= 0.5 <= high


def worth_of(sums: PromptSums, level: float = 0.95) -> float:
    """Effective number of independent observations behind a share (Korn and Graubard 1998).

    p (1 - p) / var(p), var(p) = n / (n - 1) sum_i (a_i - p b_i)^2 / (sum_i b_i)^2 over n prompts, times (z / t_(n-1))^2
    for the degrees of freedom; at most the number of observations. It is at least one per prompt, or less if their
    sizes differ (Kish 1965): no value between 0 and 1 varies more than one that is 0 or 1.

    Args:
        sums: numerator and denominator, for example pairs won and pairs; the denominators count observations.
        level: coverage of the interval that it is for.
    """
    above, below = sums.values[sums.values[:, 1] > 0].T
    total, prompts = float(below.sum()), len(below)
    share = float(above.sum()) / total
    spread = float(((above - share * below) ** 2).sum()) / total**2
    least = total**2 / float((below**2).sum())
    if prompts < 3 or spread < _STILL:
        return least
    quantile = 1.0 - (1.0 - level) / 2
    z = NormalDist().inv_cdf(quantile)
    worth = share * (1 - share) * (prompts - 1) / (prompts * spread)
    worth *= (z / student_quantile(quantile, prompts - 1)) ** 2
    return min(max(worth, least), total)


@cache
def student_quantile(share: float, freedom: float) -> float:
    """Quantile of Student's t above the median: t with P(T <= t) = share, from the beta distribution.

    Args:
        share: above 1/2 and below 1.
        freedom: degrees of freedom, at least 1.
    """
    x = _beta_quantile(2.0 * (1.0 - share), freedom / 2, 0.5)
    return math.sqrt(freedom * (1.0 - x) / x)


def student_p_value(t: float, freedom: int) -> float:
    """P(|T| >= |t|) of Student's t (Abramowitz and Stegun 1964, 26.7.1 and 26.5.27)."""
    return _beta_distribution(freedom / (freedom + t * t), freedom / 2, 0.5) if t else 1.0


def binomial_p_value(won: int, lost: int) -> float:
    """Exact two-sided p-value of `won` against `lost` if both are equally likely: twice the smaller tail, at most 1."""
    fewer, more = sorted((won, lost))
    if fewer == more:
        return 1.0
    # P(X <= k) of n draws is I_1/2(n - k, k + 1) (Abramowitz and Stegun 1964, 26.5.24).
    return min(1.0, 2.0 * _beta_distribution(0.5, more, fewer + 1))


def standard_error(values: Sequence[float] | NDArray[np.float64]) -> float:
    """Standard error of the mean of independent values; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    return float(np.std(values, ddof=1) / len(values) ** 0.5)
