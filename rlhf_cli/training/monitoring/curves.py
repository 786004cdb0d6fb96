"""Curves of a run and what can be said of them against their noise."""

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
        slope: a step.
        error: standard error of the slope, from what the line leaves unexplained.
    """

    slope: float
    error: float

    @property
    def certainty(self) -> float:
        """The slope in standard errors; its sign is the slope's."""
        if self.error == 0.0:
            return math.copysign(math.inf, self.slope) if self.slope else 0.0
        return self.slope / self.error


@dataclass(frozen=True)
class Curve:
    """A metric over the steps that have it.

    Attributes:
        steps: rising.
        values: finite, one a step.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @staticmethod
    def of(rows: Sequence[Mapping[str, Any]], name: str) -> Curve:
        """A metric of the rows of a `metrics.jsonl`; rows in which it is missing, null or not finite have no part."""
        found = [(row["step"], row.get(name)) for row in rows]
        kept = [(step, float(value)) for step, value in found if _is_figure(value)]
        return Curve(tuple(step for step, _ in kept), tuple(value for _, value in kept))

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return iter(zip(self.steps, self.values, strict=True))

    def first(self, share: float = 0.2, *, least: int = 3) -> Curve:
        """Its beginning: a share of its points, at least so many."""
        count = max(least, round(share * len(self)))
        return Curve(self.steps[:count], self.values[:count])

    def last(self, share: float = 0.2, *, least: int = 3) -> Curve:
        """Its end: a share of its points, at least so many."""
        count = min(len(self), max(least, round(share * len(self))))
        return Curve(self.steps[len(self) - count :], self.values[len(self) - count :])

    def blocks(self, size: int) -> Iterator[Curve]:
        """Whole blocks of `size` points, one behind the other."""
        for start in range(0, len(self) - size + 1, size):
            yield Curve(self.steps[start : start + size], self.values[start : start + size])

    @property
    def mean(self) -> float:
        """Of its values; NaN without any."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def median(self) -> float:
        """Of its values; NaN without any."""
        return statistics.median(self.values) if self.values else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean, as if steps were independent: each step samples anew, so its noise is its own."""
        return statistics.stdev(self.values) / math.sqrt(len(self)) if len(self) > 1 else math.inf

    @property
    def noise(self) -> float:
        """Standard deviation of a single step around its neighbors, so that a trend does not count as noise."""
        changes = [(after - before) ** 2 for before, after in zip(self.values, self.values[1:], strict=False)]
        return math.sqrt(statistics.fmean(changes) / 2) if changes else math.inf

    @property
    def trend(self) -> Trend:
        """Line through the curve; without slope, and uncertain, where there are fewer than three points."""
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


def _is_figure(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
