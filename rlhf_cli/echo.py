"""Whether a terminal shows what is typed: switched off while something is drawn, and back on however that ends."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

try:
    import termios
except ImportError:  # Windows
    termios = None

_before: tuple[int, list] | None = None
"""Terminal and its settings from before the echo was switched off; None while it is not."""


@contextmanager
def without_echo() -> Iterator[None]:
    """Do not show what is typed, which would be mixed into what is drawn; the next question reads it."""
    global _before
    if termios is None or _before is not None or not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    settings = termios.tcgetattr(descriptor)
    _before = descriptor, settings
    try:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, [*settings[:3], settings[3] & ~termios.ECHO, *settings[4:]])
        yield
    finally:
        restore_echo()


def restore_echo() -> None:
    """Show again what is typed, if that was switched off; also for a process that ends without cleanup."""
    global _before
    if termios is not None and _before is not None:
        descriptor, settings = _before
        _before = None
        termios.tcsetattr(descriptor, termios.TCSADRAIN, settings)


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP leave all contexts, if a person types here: each restores what it changed of the terminal.

    By default these signals end the process at once, and the terminal stays without echo, cursor or its screen. What
    handles them itself inside, such as a stage, still does.

    Raises:
        SystemExit: with 128 + signal, the code of a process that it ended. A second signal ends the process at once.
    """
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    if not sys.stdin or not sys.stdin.isatty():
        names = []
    signums = [one for one in (getattr(signal, name) for name in names) if signal.getsignal(one) == signal.SIG_DFL]

    def leave(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_DFL)
        raise SystemExit(128 + signum)

    for signum in signums:
        signal.signal(signum, leave)
    try:
        yield
    finally:
        for signum in signums:
            signal.signal(signum, signal.SIG_DFL)
