"""Requests to stop: after the first signal the stage saves and ends; a second Ctrl-C ends the process at once.

So does the first Ctrl-C while nothing is under way that would be saved, such as while a model is loaded.

Under `--processes` only the supervisor counts signals: a scheduler that signals every process of a job reaches each
worker twice, directly and through the supervisor, but means one request.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Protocol, Self

from rlhf_cli.distributed.process_group import is_lost_peer
from rlhf_cli.distributed.worker import is_supervised
from rlhf_cli.errors import Interrupted
from rlhf_cli.run_log import write

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Signals that ask a run to save and stop; schedulers send SIGUSR1 ahead of SIGTERM."""


Handler = Callable[[int, FrameType | None], object]


@contextmanager
def handling(stop: Handler, suspend: Handler) -> Iterator[None]:
    """Context in which the main thread handles requests to stop and Ctrl-Z; the handlers of before come back."""
    handlers = dict.fromkeys(STOP_SIGNALS, stop) | {signal.SIGTSTP: suspend}
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class StopRequest(Protocol):
    """Tells whether a signal asked the work to stop."""

    @property
    def requested(self) -> bool:
        """Whether a signal came, for loops that save before they stop."""
        ...

    def check(self) -> None:
        """Raise `Interrupted` if a signal came. Call it where at most a step or a batch is lost."""
        ...


class SignalStop:
    """A `StopRequest` that handles SIGINT, SIGTERM and SIGUSR1 inside its `with` block.

    Args:
        waits_for: returns what is under way that is saved first, for a message; None if nothing is.
        show: shows a message where a bar is on the screen, and asks for it as long as it is shown, since what is waited
            for changes; returns False where no bar is, and then the message is written.
    """

    def __init__(
        self,
        waits_for: Callable[[], str | None] = lambda: "the current step",
        show: Callable[[Callable[[], str]], bool] = lambda text: False,
    ) -> None:
        self._waits_for, self._show = waits_for, show
        self._signum: int | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self._signum is not None

    def check(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if self._signum is not None:
            raise Interrupted(self._signum)

    def request(self) -> None:
        """Ask for a stop as SIGTERM does, from another thread."""
        if self._signum is None:
            self._signum = signal.SIGTERM

    def __enter__(self) -> Self:
        for signum in STOP_SIGNALS:
            self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        if is_lost_peer(error):  # torchrun then sends SIGTERM at once, which would end this process before it says why
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _text(self) -> str:
        assert self._signum is not None
        found = self._waits_for() or "the current operation"
        more = "Ctrl-C again" if self._signum == signal.SIGINT else "SIGINT (Ctrl-C)"
        return f"{signal.Signals(self._signum).name}: stopping after {found}; {more} stops at once"

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is None:
            self._signum = signum
            if self._waits_for() is None and signum == signal.SIGINT and not is_supervised():
                raise KeyboardInterrupt
            if not self._show(self._text):
                os.write(2, f"\n{self._text()}\n".encode())  # not `print`, which the handler may have interrupted
            write(self._text())
        elif signum == signal.SIGINT and not is_supervised():
            raise KeyboardInterrupt
