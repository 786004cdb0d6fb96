"""Shares with 95 % intervals over prompts, since completions of one prompt are similar."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rlhf_cli.intervals import share_interval


@dataclass(frozen=True)
class Rate:
    """A share.

    Attributes:
        value: None if nothing was counted.
        low: lower end of its interval.
        high: upper end.
        count: denominator.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int

    @staticmethod
    def of(counts: Iterable[tuple[str, float, int]]) -> Rate:
        """Compute from (prompt, numerator, denominator) rows; rows of one prompt are one unit."""
        above: dict[str, float] = {}
        below: dict[str, int] = {}
        for prompt, counted, total in counts:
            above[prompt] = above.get(prompt, 0.0) + counted
            below[prompt] = below.get(prompt, 0) + total
        total = sum(below.values())
        if not total:
            return Rate(None, None, None, 0)
        numerators = [above[prompt] for prompt in below]
        value = sum(numerators) / total
        low, high = share_interval(numerators, list(below.values()))
        return Rate(value, low, high, total)

    def to_json(self) -> dict[str, Any]:
        """Convert for the report."""
        interval = None if self.low is None else [round(self.low, 4), round(self.high or 0.0, 4)]
        return {"value": rounded(self.value), "interval": interval, "count": self.count}

    def __str__(self) -> str:
        if self.value is None or self.low is None or self.high is None:
            return "nothing to count"
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%}) of {self.count:,}"


def rounded(value: float | None) -> float | None:
    """Round to four digits, for reports."""
    return None if value is None else round(value, 4)
