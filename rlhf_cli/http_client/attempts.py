"""Observe the attempts at a request, for callers to whom every attempt may cost something."""

from __future__ import annotations

from typing import Protocol


class AttemptObserver(Protocol):
    """Is notified of each attempt at one request."""

    async def begin(self) -> None:
        """Called before each attempt; an exception ends the request."""

    def outcome_unknown(self) -> None:
        """Called after an attempt that was sent but got no response: the server may have processed it."""


class NoObserver:
    """Ignores all attempts."""

    async def begin(self) -> None:
        """Allow the attempt."""

    def outcome_unknown(self) -> None:
        """Do nothing."""
