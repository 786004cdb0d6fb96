"""Attempts at a request, for those to whom each of them may cost something."""

from __future__ import annotations

from typing import Protocol


class Attempts(Protocol):
    """Told of each attempt at one request."""

    async def begin(self) -> None:
        """Before each attempt; what it raises ends the request."""

    def lost(self) -> None:
        """After an attempt that went out and whose outcome nobody here knows: it may have been carried out."""


class Uncounted:
    """Attempts that cost nothing."""

    async def begin(self) -> None:
        """Any number may begin."""

    def lost(self) -> None:
        """Nothing is lost by it."""
