"""Whether a terminal shows what is typed: switched off while something is drawn, and back on however that ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
