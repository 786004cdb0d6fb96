"""Shares with their intervals, as reports about reward models write them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_cli.intervals import percent, percent_span, share_interval

Term = tuple[str, float, float]
"""Key of a prompt, what was won, and what there was to win."""


@dataclass(frozen=True)
class Measured:
    """A figure between 0 and 1 with its 95 % interval over prompts.

    Attributes:
        value: the figure.
        low: lower end of the interval.
        high: upper end.
        prompts: prompts behind it.
        count: observations behind it, such as pairs.
    """

    value: float
    low: float
    high: float
    prompts: int
    count: int

    def __str__(self) -> str:
        return f"{percent(self.value)} ({percent_span(self.low, self.high)})"

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def measured_share(terms: Iterable[Term]) -> Measured | None:
    """Return sum(won) / sum(weight) over terms (prompt, won, weight); None if there are none.

    Terms of one prompt are added before the interval is computed, since they are correlated. Only the ratios of weights
    count: the interval takes the weights as if they summed to the number of terms (see `intervals.worth_of`).

    Args:
        terms: won is between 0 and its weight, which is above 0.
    """
    sums: dict[str, list[float]] = {}
    count, total = 0, 0.0
    for prompt, won, weight in terms:
        both = sums.setdefault(prompt, [0.0, 0.0])
        both[0] += won
        both[1] += weight
        count, total = count + 1, total + weight
    if not count:
        return None
    scale = count / total
    won = [one * scale for one, _ in sums.values()]
    low, high = share_interval(won, [weight * scale for _, weight in sums.values()])
    return Measured(sum(won) / count, low, high, len(sums), count)
