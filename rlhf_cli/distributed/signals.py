"""Requests to stop: the first signal lets the stage save and end; a second Ctrl-C ends at once.

Under `--processes` the supervisor alone counts: who signals every process of a job (a scheduler) reaches each of ours
twice, directly and through the supervisor, and means it once.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Protocol, Self

from rlhf_cli.distributed.worker import is_supervised
from rlhf_cli.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest(Protocol):
    """Asks whether a signal wants the work to stop."""

    @property
    def requested(self) -> bool:
        """Whether a signal came, for loops that save first."""
        ...

    def check(self) -> None:
        """Raise `Interrupted` if so. Call it where everything done so far is saved."""
        ...


class SignalStop:
    """A `StopRequest` that listens to SIGINT, SIGTERM and SIGUSR1 while it is entered."""

    def __init__(self) -> None:
        self._signum: int | None = None
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self._signum is not None

    def check(self) -> None:
        """Raise `Interrupted` if one did."""
        if self._signum is not None:
            raise Interrupted(self._signum)

    def __enter__(self) -> Self:
        for signum in _SIGNALS:
            self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is None:
            self._signum = signum
            name = signal.Signals(signum).name
            # os.write, since the handler may have interrupted a print
            os.write(2, f"\n{name}: stopping after this step; Ctrl-C again to stop at once\n".encode())
        elif signum == signal.SIGINT and not is_supervised():
            raise KeyboardInterrupt
