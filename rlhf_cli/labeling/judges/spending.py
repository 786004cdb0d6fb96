"""What one question's attempts cost: each goes out only if it fits the budget, and one that nobody heard of is paid."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rlhf_cli.labeling.judges.budget import Budget


class ClosedError(Exception):
    """No further attempt begins: the run is ending."""


class Spending:
    """Reserves the most that an attempt at one question can cost; an `AttemptObserver`.

    Args:
        budget: that of all judges.
        most: what an attempt can cost.
        settled: notified when something that was under way no longer is; shared by all questions of a judge.
        is_closing: whether nothing new begins.
        charge: keeps on the disk that an attempt may have been billed.
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
        """Wait until the most that this attempt can cost fits, and reserve it.

        An attempt that was answered without a bill (429, 503) leaves its reservation to the next one.

        Raises:
            CostLimitError: it does not fit, and nothing is under way that could turn out cheaper.
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
        """Nobody knows whether the attempt was carried out: it counts at the most it can cost, in later runs too."""
        self._is_reserved = False
        self._budget.charge(self._most)
        self._charge()

    async def settle(self, cost: float) -> None:
        """The question is over; its last attempt cost this much."""
        async with self._settled:
            if self._is_reserved:
                self._is_reserved = False
                self._budget.settle(self._most, cost)
            self._settled.notify_all()
