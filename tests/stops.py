"""Requests to stop, as a signal makes them: never, at a step, at a batch or a token, or after some time."""

from __future__ import annotations

import signal
import time

from rlhf_cli.errors import Interrupted


class NeverStop:
    """No signal comes."""

    requested = False

    def check(self) -> None:
        """Go on."""


class StopAtStep:
    """A signal comes during this step, the first being 1: a training loop asks `requested` once per step."""

    def __init__(self, step: int) -> None:
        self.step, self.asked = step, 0

    @property
    def requested(self) -> bool:
        self.asked += 1
        return self.asked >= self.step

    def check(self) -> None:
        if self.asked >= self.step:
            raise Interrupted(signal.SIGTERM)


class StopAtCheck:
    """A signal comes before the check of this number, the first being 1: of batches or of tokens."""

    def __init__(self, number: int) -> None:
        self.number, self.asked = number, 0

    @property
    def requested(self) -> bool:
        return self.asked >= self.number

    def check(self) -> None:
        self.asked += 1
        if self.requested:
            raise Interrupted(signal.SIGTERM)


class StopInSeconds:
    """A signal comes that many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    @property
    def requested(self) -> bool:
        return time.monotonic() >= self._at

    def check(self) -> None:
        if self.requested:
            raise Interrupted(signal.SIGTERM)
