"""What verdicts may cost: a request goes out only if the most it can cost still fits beside all that are under way."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_cli.errors import CostLimitError

_OF_TEMPLATES = 64
"""Tokens that a chat template may put around two messages, generously."""
_MILLION = 1e6


@dataclass(frozen=True)
class Prices:
    """Of an endpoint, for a million tokens each."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Of so many tokens."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / _MILLION


def most_tokens(text: str) -> int:
    """A bound on the tokens of a text: no token of the tokenizers in use is shorter than a byte of it."""
    return len(text.encode("utf-8", "surrogatepass")) + _OF_TEMPLATES


class Budget:
    """What has been spent, what is under way, and where the limit is.

    Args:
        limit: `max_cost`; None is without bound.
        spent: before this run.
        unheard: how much of that went to attempts whose outcome nobody knows.
    """

    def __init__(self, limit: float | None, spent: float = 0.0, unheard: float = 0.0) -> None:
        self._limit, self.spent, self.unheard = limit, spent, unheard
        self._reserved: list[float] = []

    def fits(self, most: float) -> bool:
        """Whether a request of at most this cost may go out now."""
        return self._limit is None or self.spent + sum(self._reserved) + most <= self._limit

    @property
    def is_waiting(self) -> bool:
        """Whether requests are under way, which may turn out cheaper than they could."""
        return bool(self._reserved)

    def reserve(self, most: float) -> None:
        """A request goes out."""
        self._reserved.append(most)

    def settle(self, most: float, cost: float) -> None:
        """A request came back, or did not."""
        self._reserved.remove(most)
        self.spent += cost

    def charge(self, most: float) -> None:
        """What was reserved is spent: nobody knows whether the attempt was carried out, and it may be billed."""
        self.settle(most, most)
        self.unheard += most

    def exceeded(self, most: float) -> CostLimitError:
        """What to tell of a request that does not fit."""
        unheard = f" ({self.unheard:.4g} of it for attempts that had no answer)" if self.unheard else ""
        return CostLimitError(
            f"the judges' verdicts have cost {self.spent:.4g}{unheard}, and the next may cost {most:.4g}: more than "
            f"`label.judge.max_cost: {self._limit:g}`",
            hint="all verdicts are kept: allow more with `--set label.judge.max_cost=...` and run the same command "
            "again",
        )
