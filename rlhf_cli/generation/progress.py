"""How far completions are that are being drawn, in tokens: what bars show of them. Imports no torch."""

from __future__ import annotations

import time

from rlhf_cli.progress import Task


class Drawing:
    """Counts what a generator draws and estimates how much is to come; a `Progress` of `Generator.generate`.

    Until completions have ended, each is expected to have `limit` tokens. Then their mean length is estimated as all
    tokens per completion that ended, at most `limit`. If every token is as likely as any other to end a completion,
    this is the maximum likelihood estimate from ended and running ones together.

    Args:
        count: completions to draw.
        limit: largest number of tokens of one.
        bar: shows them, in units of completions; None shows nothing.

    Attributes:
        ended: completions that ended.
        tokens: tokens drawn, also of running ones; 0 if the generator does not tell.
    """

    def __init__(self, count: int, limit: int, bar: Task | None = None) -> None:
        self.ended = self.tokens = 0
        self._count, self._limit, self._bar = count, limit, bar
        self._began: float | None = None
        self._first = 0

    def __call__(self, completions: int, tokens: int = 0, /) -> None:
        """Count what was drawn since the last call."""
        now = time.monotonic()
        self.ended += completions
        self.tokens += tokens
        if self._began is None:  # the first call also took the time to load the model
            self._began, self._first = now, self.tokens
        if self._bar is None:
            return
        if not self.tokens or self.ended >= self._count:
            self._bar.advance(completions)
            return
        rate = self.per_second(now)
        self._bar.within(
            self.fraction * self._count - self.ended,
            f"{self.tokens:,} tokens",
            ended=completions,
            rate=f"{rate:,.0f} tokens/s" if rate else "",
            left=(self.expected - self.tokens) / rate if rate else None,
            is_guess=not self.ended,
        )

    def per_second(self, now: float) -> float:
        """Return tokens per second; 0 where that is not known yet."""
        if self._began is None or now <= self._began:
            return 0.0
        return (self.tokens - self._first) / (now - self._began)

    @property
    def expected(self) -> float:
        """Expected number of tokens of all completions, those drawn included."""
        mean = min(self._limit, self.tokens / self.ended) if self.ended else self._limit
        running = self._count - self.ended
        # Those that run need a token each at least, and all need no more than the limit allows.
        return min(max(self._count * mean, self.tokens + running), self.tokens + running * self._limit)

    @property
    def fraction(self) -> float:
        """Share of the work that is done."""
        if self.ended >= self._count:
            return 1.0
        return self.tokens / self.expected if self.tokens else self.ended / self._count
