"""How far completions are that are being drawn, in tokens: what bars show of them. Imports no torch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from rlhf_cli.generation.length_estimate import LengthEstimate
from rlhf_cli.progress import Task

_ESTIMATE_EVERY = 0.5
"""Seconds between two estimates of the time left, at least."""
_CHANGE, _SLACK = 1.25, 1.0
"""Most by which a new estimate differs from that of `_ESTIMATE_EVERY` before, as a factor and in seconds."""
_EVEN = 4.0
"""Steps that the first guess counts as: half of the time of a step with all rows does not depend on their number."""


class Drawing:
    """Counts what a generator draws and estimates how much is to come; a `Progress` of `Generator.generate`.

    A generator that tells the lengths of completions draws one token per row and call. Then it is known how many rows
    run, since when, and how long a step takes with them. The time left is that of the steps to come: also those in
    which the last rows of a batch run alone. Of other generators, it is the tokens to come at the rate so far.

    Args:
        count: completions that this process draws.
        limit: largest number of tokens of one.
        bar: shows them, in units of completions; None shows nothing.

    Attributes:
        ended: completions that ended.
        tokens: tokens drawn, also of running ones; 0 if the generator does not tell.
    """

    def __init__(self, count: int, limit: int, bar: Task | None = None) -> None:
        self.ended = self.tokens = 0
        self._count, self._bar = count, bar
        self._lengths = LengthEstimate(limit)
        self._rows: Counter[int] = Counter()  # call before which rows entered -> number of rows
        self._calls = 0
        self._steps = _StepTimes()
        self._most, self._is_refilled = 0, False
        self._began: float | None = None
        self._first = 0
        self._left: float | None = None
        self._estimated = 0.0

    def __call__(self, completions: int, tokens: int = 0, lengths: Sequence[int] | None = None, /) -> None:
        """Count what was drawn since the last call."""
        now = time.monotonic()
        self.ended += completions
        self.tokens += tokens
        if lengths is not None:
            self._count_rows(tokens, lengths, now)
        elif completions and tokens:
            for _ in range(completions):
                self._lengths.drawn(min(round(tokens / completions), self._lengths.limit))
        if self._began is None:  # the first call also took the time to load the model
            self._began, self._first = now, self.tokens
        if self._bar is None:
            return
        if not self.tokens or self.ended >= self._count:
            self._bar.advance(completions)
            return
        if self._left is None or now - self._estimated >= _ESTIMATE_EVERY:
            self._left, self._estimated = self._steady(self.seconds_left(now), now), now
        of_all = self._bar.per_own
        rate = self.per_second(now) * of_all
        self._bar.within(
            self.fraction * self._count - self.ended,
            f"{self.tokens * of_all:,.0f}/~{self.expected * of_all:,.0f} tokens",
            ended=completions,
            rate=f"{rate:,.0f}/s" if rate else "",
            left=None if self._left is None else max(self._left - (now - self._estimated), 0.0),
            is_guess=not self.ended,
        )

    def _count_rows(self, rows: int, lengths: Sequence[int], now: float) -> None:
        """Count a step: a token of each row, after which rows of these lengths ended."""
        before = self._rows.total()
        if entered := rows - before:
            self._is_refilled |= before > 0
            self._rows[self._calls] += entered
        self._lengths.run({self._calls - call: count for call, count in self._rows.items()})
        self._calls += 1
        for length in lengths:
            self._lengths.end(length)
            self._rows[self._calls - length] -= 1
        self._rows = +self._rows  # drops calls whose rows have all ended
        self._most = max(self._most, rows)
        self._steps.add(rows, now, is_next=entered == 0)

    def per_second(self, now: float) -> float:
        """Return tokens per second; 0 where that is not known yet."""
        if self._began is None or now <= self._began:
            return 0.0
        return (self.tokens - self._first) / (now - self._began)

    def _steady(self, found: float | None, now: float) -> float | None:
        """Return an estimate of the seconds left that is near the one shown, so that this does not jump."""
        if self._left is None or found is None:
            return found
        elapsed = now - self._estimated
        shown, times = max(self._left - elapsed, 0.0), elapsed / _ESTIMATE_EVERY
        change, slack = _CHANGE ** min(times, 100), _SLACK * times
        return min(max(found, shown / change - slack), shown * change + slack)

    def seconds_left(self, now: float) -> float | None:
        """Return the seconds until all completions have ended; None where that is not known yet."""
        if not self._calls:
            rate = self.per_second(now)
            return (self.expected - self.tokens) / rate if rate else None
        times = self._steps.fitted(self._most)
        if times is None:
            return None
        per_step, per_row = times
        return per_step * self._steps_left() + per_row * (self.expected - self.tokens)

    def _steps_left(self) -> float:
        """Expected number of steps to come."""
        running, waiting = self._rows.total(), self._waiting
        age = sum((self._calls - call) * count for call, count in self._rows.items()) / running if running else 0.0
        if self._is_refilled and waiting:
            tail = self._most * self._lengths.remaining()
            return max(self.expected - self.tokens - tail, 0.0) / self._most + self._lengths.longest(self._most)
        whole, rest = divmod(waiting, self._most)
        return (
            (self._lengths.longest(running, age) if running else 0.0)
            + whole * self._lengths.longest(self._most)
            + (self._lengths.longest(rest) if rest else 0.0)
        )

    @property
    def _waiting(self) -> int:
        return max(self._count - self.ended - self._rows.total(), 0)

    @property
    def expected(self) -> float:
        """Expected number of tokens of all completions, those drawn included."""
        running = sum(self._lengths.remaining(self._calls - call) * count for call, count in self._rows.items())
        return self.tokens + running + self._waiting * self._lengths.remaining()

    @property
    def fraction(self) -> float:
        """Share of the work that is done."""
        if self.ended >= self._count:
            return 1.0
        return self.tokens / self.expected if self.tokens else self.ended / self._count


class _StepTimes:
    """Seconds of a step as a line over its number of rows, fitted by least squares.

    Until steps with different numbers of rows were seen, half of the time is taken to be the same for all.
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._count = self._rows = self._squares = self._seconds = self._products = 0.0

    def add(self, rows: int, now: float, *, is_next: bool) -> None:
        """Count a step that ended; `is_next` is False where rows entered, whose prompts took time too."""
        if self._last is not None and (is_next or not self._count):
            seconds = now - self._last
            self._count += 1
            self._rows += rows
            self._squares += rows * rows
            self._seconds += seconds
            self._products += rows * seconds
        self._last = now

    def fitted(self, most: int) -> tuple[float, float] | None:
        """Return seconds per step and per row; None before the second step.

        Args:
            most: largest number of rows.
        """
        if not self._count:
            return None
        # With x = rows / most and t = a + b x, let u = a + b and v = a - b: t = u (1 + x) / 2 + v (1 - x) / 2, and v is
        # drawn towards 0.
        n, x, xx = self._count, self._rows / most, self._squares / most**2
        t, xt = self._seconds, self._products / most
        uu, uv, vv = (n + 2 * x + xx) / 4, (n - xx) / 4, (n - 2 * x + xx) / 4 + _EVEN / 4
        ut, vt = (t + xt) / 2, (t - xt) / 2
        v = (vt * uu - ut * uv) / (uu * vv - uv * uv)
        u = (ut - v * uv) / uu
        v = min(max(v, -u), u)  # neither part of a step takes less than no time
        return (u + v) / 2, (u - v) / 2 / most
