"""How long completions will be, from those that ended and those that run; for the time left. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

_BUCKETS = 24
"""Parts of the longest length; in each, every token is as likely as any other to end a completion."""
_PRIOR, _OWN = 12.0, 1.0
"""Ended completions that a first guess counts as: of all lengths (the default), and of each bucket."""
_SHARE, _USUAL = 0.3, 256
"""First guess of the mean length, as a share of a limit up to `_USUAL`; for longer limits it grows as their root."""


class LengthEstimate:
    """Probability that a completion ends at its next token, by how long it is already.

    In each bucket of lengths it is the number of ends over the number of tokens, drawn towards the same ratio of all
    buckets; that is drawn towards a first guess. Completions that run, and those cut at the limit, count by their
    tokens: what they did not do is known (Kaplan and Meier 1958).

    Args:
        limit: largest number of tokens of a completion.
        prior: ended completions that the first guess counts as.
    """

    def __init__(self, limit: int, *, prior: float = _PRIOR) -> None:
        self.limit, self._prior = limit, prior
        self._count = min(_BUCKETS, limit)
        self._width = limit / self._count
        self._tokens, self._ends = [0.0] * self._count, [0.0] * self._count
        self._guess = _rate_of(_SHARE * min(1.0, math.sqrt(_USUAL / limit)) * limit, limit)
        self._known: list[float] | None = None

    @property
    def ends(self) -> float:
        """Completions that ended before the limit."""
        return sum(self._ends)

    def run(self, ages: Mapping[int, int]) -> None:
        """Count one more token of completions that run: age in tokens before it -> their number."""
        for age, count in ages.items():
            self._tokens[self._bucket(age)] += count
        self._known = None

    def drawn(self, length: int) -> None:
        """Count all tokens of a completion that is told of once it has ended."""
        for bucket in range(self._count):
            self._tokens[bucket] += max(0.0, min(length - bucket * self._width, self._width))
        self.end(length)

    def end(self, length: int) -> None:
        """A completion ended with so many tokens."""
        self._ends[self._bucket(length - 1)] += length < self.limit
        self._known = None

    def _bucket(self, age: int) -> int:
        return min(int(age / self._width), self._count - 1)

    def _rates(self) -> list[float]:
        """The rate of ending, per token, in each bucket."""
        if self._known is None:
            overall = (self.ends + self._prior) / (sum(self._tokens) + self._prior / self._guess)
            pairs = zip(self._ends, self._tokens, strict=True)
            self._known = [(ends + _OWN) / (tokens + _OWN / overall) for ends, tokens in pairs]
        return self._known

    def remaining(self, age: float = 0) -> float:
        """Expected number of tokens that a completion of this age still needs."""
        expected, alive = 0.0, 1.0
        for rate, width in self._ahead(age):
            ended = -math.expm1(-rate * width)
            expected += alive * ended / rate
            alive *= 1 - ended
        return expected

    def longest(self, count: float, age: float = 0) -> float:
        """Expected number of tokens until all of `count` completions of this age have ended."""
        expected, alive = 0.0, 1.0
        for rate, width in self._ahead(age):
            after = alive * math.exp(-rate * width)
            running = [1 - (1 - share) ** count for share in (alive, math.sqrt(alive * after), after)]
            expected += width * (running[0] + 4 * running[1] + running[2]) / 6  # Simpson's rule
            alive = after
        return expected

    def _ahead(self, age: float) -> list[tuple[float, float]]:
        """Rate and width of each bucket after an age."""
        first = self._bucket(int(age))
        rates = self._rates()
        return [
            (rates[number], (number + 1) * self._width - max(age, number * self._width))
            for number in range(first, self._count)
            if (number + 1) * self._width > age
        ]


def _rate_of(mean: float, limit: int) -> float:
    """The rate of ending per token with which completions of at most `limit` tokens have this mean, by bisection."""
    low, high = 1e-9, 10.0
    for _ in range(60):
        rate = math.sqrt(low * high)
        if -math.expm1(-rate * limit) / rate > mean:
            low = rate
        else:
            high = rate
    return high
