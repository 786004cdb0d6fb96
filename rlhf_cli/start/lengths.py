"""How long completions are, from a few of them; and the limit within which most of them end."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

LIMITS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Values of `max_new_tokens` to choose from."""
_MOST = 0.75
"""Share of completions that end within a limit that is chosen."""
_HALF = 0.5
"""If fewer end within the largest limit, a long limit would cost much and change little."""
_FEW = 3
"""Completions that must have ended to estimate the length of those that had not."""
GUESS, _LONGEST_GUESS = 256, 512
"""Limit where lengths are not known, and the longest one that is tried where completions were seen to be long."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of a few completions, in tokens. Of those that were not sampled to their end, only a minimum is known.

    Attributes:
        ended: lengths of the completions that ended, ascending.
        running: number of completions that had not ended.
        sampled: tokens of each of these.
        what: what all of them are, in the plural.
    """

    ended: Sequence[int]
    running: int = 0
    sampled: int = 0
    what: str = "sampled completions"

    @property
    def count(self) -> int:
        """Number of completions."""
        return len(self.ended) + self.running

    def is_estimate(self, limit: int) -> bool:
        """Whether `share_ended` goes beyond what was sampled."""
        return self.running > 0 and limit > self.sampled

    def share_ended(self, limit: int) -> float:
        """Share of completions that end within `limit` tokens.

        Beyond what was sampled, every token is taken to end a completion with the same probability: completions that
        ended over tokens, its estimate of maximum likelihood.
        """
        if not self.is_estimate(limit):
            return bisect_right(self.ended, limit) / self.count
        hazard = len(self.ended) / (sum(self.ended) + self.running * self.sampled)
        return 1 - (1 - self.share_ended(self.sampled)) * (1 - hazard) ** (limit - self.sampled)

    def mean_tokens(self, limit: int) -> float:
        """Mean length of completions that are cut off at `limit` tokens."""
        return sum(1 - self.share_ended(tokens) for tokens in range(limit))

    def cuts_most(self, limit: int) -> bool:
        """Whether a limit is known to cut off most completions."""
        return self.tells(limit) and self.share_ended(limit) < _HALF

    @property
    def is_guess(self) -> bool:
        """Whether sampling stopped before enough completions ended to tell how long they are."""
        return self.running > 0 and len(self.ended) < _FEW and self.sampled < _LONGEST_GUESS

    def limit(self, most: int) -> int | None:
        """The smallest of `LIMITS`, up to `most`, within which most completions end; None if too few do."""
        fitting = [limit for limit in LIMITS if limit <= most] or [most]
        if self.is_guess:
            longer = min(_LONGEST_GUESS, max(GUESS, 2 * self.sampled))
            return next((limit for limit in fitting if limit >= longer), fitting[-1])
        found = next((limit for limit in fitting if self.share_ended(limit) >= _MOST), fitting[-1])
        return found if self.share_ended(found) >= _HALF else None

    def tells(self, limit: int) -> bool:
        """Whether the share that a limit cuts off is known or can be estimated."""
        return not (self.is_guess and self.is_estimate(limit))

    def cut_off(self, limit: int) -> str:
        """What a limit cuts off, in words."""
        stopped = f"after {self.sampled:,} tokens, where sampling was stopped"
        if not self.tells(limit):
            ended = f"{len(self.ended):,} of {self.count:,} {self.what} had ended {stopped}"
            return f"what it cuts off is not known: {ended}; if that is much, raise `max_new_tokens` in the recipe"
        about = "about " if self.is_estimate(limit) else ""
        text = f"{about}{1 - self.share_ended(limit):.0%} of {self.count:,} {self.what} are cut off"
        return f"{text} ({self.running:,} had not ended {stopped})" if about else text

    def described(self, limit: int, most: int) -> list[str]:
        """What a limit cuts off, and what a longer one costs, in lines."""
        lines = [f"limit of a completion: {limit:,} tokens; {self.cut_off(limit)}"]
        if not self.tells(limit):
            return lines
        cut, longer = 1 - self.share_ended(limit), min(2 * limit, most)
        if cut and longer > limit and self.tells(longer):
            more = self.mean_tokens(longer) / self.mean_tokens(limit) - 1
            lines.append(
                f"a limit of {longer:,} would cut off about {1 - self.share_ended(longer):.0%}, and completions would "
                f"take about {more:.0%} more tokens and time (`max_new_tokens` in the recipe)"
            )
        return lines
