"""Limits the cost of verdicts: a request is sent only if its maximum cost fits next to all requests in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from rlhf_cli.errors import CostLimitError

_OF_TEMPLATES = 64
"""Generous bound on the tokens a chat template adds around two messages."""
_MILLION = 1e6


@dataclass(frozen=True)
class Prices:
    """Prices of an endpoint, per million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Cost of this many tokens."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / _MILLION


def most_tokens(text: str) -> int:
    """Upper bound on the tokens of a text: in the tokenizers in use every token is at least one byte."""
    return len(text.encode("utf-8", "surrogatepass")) + _OF_TEMPLATES


class Budget:
    """Tracks what was spent, what is reserved, and the limit.

    Args:
        limit: `max_cost`; None means no limit.
        spent: cost of earlier runs.
        unheard: part of `spent` that went to attempts without a reply.
        section: of the recipe that holds the limit, for messages.
    """

    def __init__(
        self, limit: float | None, spent: float = 0.0, unheard: float = 0.0, *, section: str = "label.judge"
    ) -> None:
        self._section = section
        self._limit, self.spent, self.unheard = limit, spent, unheard
        self._reserved: list[float] = []

    def fits(self, most: float) -> bool:
        """Whether a request with this maximum cost may be sent now."""
        return self._limit is None or self.spent + sum(self._reserved) + most <= self._limit

    @property
    def is_waiting(self) -> bool:
        """Whether requests are in flight, which may turn out cheaper than their maximum."""
        return bool(self._reserved)

    def reserve(self, most: float) -> None:
        """Reserve the maximum cost of a request that is sent."""
        self._reserved.append(most)

    def settle(self, most: float, cost: float) -> None:
        """Replace a reservation by the actual cost."""
        self._reserved.remove(most)
        self.spent += cost

    def charge(self, most: float) -> None:
        """Count a reservation in full: the attempt may have been carried out and billed."""
        self.settle(most, most)
        self.unheard += most

    def exceeded(self, most: float) -> CostLimitError:
        """The error for a request that does not fit."""
        unheard = f" ({self.unheard:.4g} of it for attempts without a reply)" if self.unheard else ""
        return CostLimitError(
            f"the verdicts have cost {self.spent:.4g}{unheard}, and the next one may cost up to {most:.4g}: more than "
            f"`{self._section}.max_cost: {self._limit:g}`",
            hint=f"all verdicts are kept: raise the limit with `--set {self._section}.max_cost=...` and run the same "
            "command again",
        )


class ClosedError(Exception):
    """The run is ending: no further attempt may begin."""


class CostReservation:
    """Reserves the maximum cost of each attempt at one question; an `AttemptObserver` of the HTTP client.

    Args:
        budget: shared by all judges.
        most: maximum cost of one attempt.
        settled: notified whenever a request is no longer in flight; shared by all questions of a judge.
        is_closing: whether the run is ending.
        charge: records on disk that an attempt may have been billed.
    """

    def __init__(
        self,
        budget: Budget,
        most: float,
        settled: asyncio.Condition,
        is_closing: Callable[[], bool],
        charge: Callable[[], object],
    ) -> None:
        self._budget, self._most, self._settled = budget, most, settled
        self._is_closing, self._charge = is_closing, charge
        self._is_reserved = False

    async def begin(self) -> None:
        """Wait until the maximum cost of this attempt fits, then reserve it.

        After a reply without a bill (429, 503) the next attempt keeps the reservation.

        Raises:
            CostLimitError: it does not fit, and no request is in flight that could turn out cheaper.
            ClosedError: the run is ending.
        """
        async with self._settled:
            if self._is_reserved:
                return
            self._settled.notify_all()  # a lost attempt of this question is no longer under way
            while not self._is_closing() and not self._budget.fits(self._most):
                if not self._budget.is_waiting:
                    raise self._budget.exceeded(self._most)
                await self._settled.wait()
            if self._is_closing():
                raise ClosedError
            self._budget.reserve(self._most)
            self._is_reserved = True

    def outcome_unknown(self) -> None:
        """Count the attempt at its maximum cost, in later runs too: it may have been carried out."""
        self._is_reserved = False
        self._budget.charge(self._most)
        self._charge()

    async def settle(self, cost: float) -> None:
        """Settle a finished question with the cost of its last attempt."""
        async with self._settled:
            if self._is_reserved:
                self._is_reserved = False
                self._budget.settle(self._most, cost)
            self._settled.notify_all()
