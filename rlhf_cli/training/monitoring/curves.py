"""Curves of a run, their trends, and the noise around them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard


@dataclass(frozen=True)
class Trend:
    """A straight line through a curve, by least squares.

    Attributes:
        slope: change per step.
        error: standard error of the slope, from the residuals.
    """

    slope: float
    error: float

    @property
    def certainty(self) -> float:
        """The slope in standard errors, with the sign of the slope."""
        if self.error == 0.0:
            return math.copysign(math.inf, self.slope) if self.slope else 0.0
        return self.slope / self.error


@dataclass(frozen=True)
class Curve:
    """A metric over the steps that have it.

    Attributes:
        steps: rising.
        values: finite, one per step.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @staticmethod
    def of(rows: Sequence[Mapping[str, Any]], name: str) -> Curve:
        """Return a metric of the rows of a `metrics.jsonl`, without those where it is missing, null or not finite."""
        found = [(row["step"], row.get(name)) for row in rows]
        kept = [(step, float(value)) for step, value in found if _is_finite(value)]
        return Curve(tuple(step for step, _ in kept), tuple(value for _, value in kept))

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return iter(zip(self.steps, self.values, strict=True))

    def first(self, share: float = 0.2, *, least: int = 3) -> Curve:
        """Return the first points: a fraction of all, but at least `least`."""
        count = max(least, round(share * len(self)))
        return Curve(self.steps[:count], self.values[:count])

    def last(self, share: float = 0.2, *, least: int = 3) -> Curve:
        """Return the last points: a fraction of all, but at least `least`."""
        count = min(len(self), max(least, round(share * len(self))))
        return Curve(self.steps[len(self) - count :], self.values[len(self) - count :])

    def blocks(self, size: int) -> Iterator[Curve]:
        """Yield consecutive whole blocks of `size` points."""
        for start in range(0, len(self) - size + 1, size):
            yield Curve(self.steps[start : start + size], self.values[start : start + size])

    def running_mean(self, width: int) -> list[float]:
        """Return the mean of the `width` values around each value, of fewer at the ends."""
        half = width // 2
        windows = (self.values[max(0, index - half) : index + half + 1] for index in range(len(self)))
        return [statistics.fmean(window) for window in windows]

    @property
    def mean(self) -> float:
        """Of the values; NaN without any."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def median(self) -> float:
        """Of the values; NaN without any."""
        return statistics.median(self.values) if self.values else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean, assuming independent steps: each step draws new samples."""
        return statistics.stdev(self.values) / math.sqrt(len(self)) if len(self) > 1 else math.inf

    @property
    def noise(self) -> float:
        """Standard deviation of a single step around its neighbors, which excludes trends."""
        changes = [(after - before) ** 2 for before, after in zip(self.values, self.values[1:], strict=False)]
        return math.sqrt(statistics.fmean(changes) / 2) if changes else math.inf

    @property
    def trend(self) -> Trend:
        """Line through the curve; slope 0 with an infinite error where there are fewer than three points."""
        if len(self) < 3:
            return Trend(0.0, math.inf)
        middle, mean = statistics.fmean(self.steps), self.mean
        spread = math.fsum((step - middle) ** 2 for step in self.steps)
        slope = math.fsum((step - middle) * (value - mean) for step, value in self) / spread
        left = math.fsum((value - mean - slope * (step - middle)) ** 2 for step, value in self)
        return Trend(slope, math.sqrt(left / (len(self) - 2) / spread))

    @property
    def span(self) -> tuple[int, int]:
        """First and last step."""
        return self.steps[0], self.steps[-1]

    @property
    def when(self) -> str:
        """`step 7`, or `steps 7 to 20`."""
        first, last = self.span
        return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
