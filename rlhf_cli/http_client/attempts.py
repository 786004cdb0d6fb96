"""Callbacks for the attempts of a request, for callers who pay per attempt."""

from __future__ import annotations

from typing import Protocol


class Attempts(Protocol):
    """Receives each attempt of one request."""

    async def begin(self) -> None:
        """Called before each attempt; an exception ends the request."""

    def lost(self) -> None:
        """Called after an attempt that was sent but has an unknown outcome: the server may have handled it."""


class Uncounted:
    """Attempts that cost nothing: no limit, nothing recorded."""

    async def begin(self) -> None:
        """Allow the attempt."""

    def lost(self) -> None:
        """Record nothing."""
