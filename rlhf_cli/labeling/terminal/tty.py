"""The terminal: reads raw keys, paints rows, and restores everything on exit, however the program ends."""

from __future__ import annotations

import contextlib
import locale
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

from rlhf_cli.errors import UsageError
from rlhf_cli.labeling.terminal.drawing import Screen
from rlhf_cli.labeling.terminal.keys import ESCAPE_SECONDS, PASTE_SECONDS, Key, KeyReader
from rlhf_cli.labeling.terminal.painting import ENTER, LEAVE, paint

try:
    import termios
except ImportError:  # Windows
    termios = None

_HINT = "label in a browser instead: add `--serve`"
_ENDS = (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))
_CHANGES = tuple(getattr(signal, name) for name in ("SIGWINCH", "SIGCONT", "SIGTSTP") if hasattr(signal, name))


@dataclass(frozen=True)
class Ended:
    """A signal asks the program to end, or the terminal is gone (SIGHUP)."""

    signum: int


@dataclass(frozen=True)
class Resized:
    """The window has another size, or its content may be lost."""


@dataclass(frozen=True)
class Suspended:
    """A signal asks the program to suspend (Ctrl-Z sent from elsewhere)."""


Event = Key | Ended | Resized | Suspended


class Terminal(Protocol):
    """The terminal functions that labeling needs."""

    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        ...

    def draw(self, screen: Screen) -> None:
        """Show a screen."""
        ...

    def events(self, timeout: float | None) -> list[Event]:
        """Events, after waiting for at most `timeout` seconds (None: forever)."""
        ...

    def forget_keys(self) -> None:
        """Discard keys that were typed but not read yet."""
        ...

    def repaint(self) -> None:
        """Draw the next screen completely."""
        ...

    def suspend(self) -> None:
        """Restore the terminal and suspend; returns when continued."""
        ...


def check_terminal() -> None:
    """Raise `UsageError` if the terminal cannot be used for labeling."""
    if termios is None:
        raise UsageError("this system has no terminal that supports raw input", hint=_HINT)
    if not (sys.stdin.isatty() or sys.stderr.isatty()):
        raise UsageError("labeling needs an interactive terminal as stdin or stderr", hint=_HINT)
    kind = os.environ.get("TERM", "")
    if kind in ("", "dumb", "unknown"):
        raise UsageError(f"labeling needs a terminal with cursor control; TERM is `{kind}`", hint=_HINT)
    encoding = locale.getpreferredencoding(False)
    if encoding.lower().replace("-", "") != "utf8":
        raise UsageError(f"labeling needs UTF-8; the encoding of the locale is {encoding}", hint="set LC_ALL=C.UTF-8")


@contextlib.contextmanager
def opened() -> Iterator[RawTerminal]:
    """The terminal of this process in raw mode on the alternate screen; restored when the block is left.

    For the main thread only, which receives signals.

    Raises:
        UsageError: see `check_terminal`.
    """
    check_terminal()
    with contextlib.ExitStack() as stack:
        read_fd, write_fd = _descriptors(stack)
        terminal = RawTerminal(read_fd, write_fd, is_colored="NO_COLOR" not in os.environ)
        stack.enter_context(terminal.listening())
        stack.callback(terminal.leave)
        terminal.enter()
        yield terminal


def _descriptors(stack: contextlib.ExitStack) -> tuple[int, int]:
    """File descriptors to read keys from and to paint on; never stdout, which is for data."""
    try:
        fd = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    except OSError:  # a terminal that is not the controlling one
        fds = [stream.fileno() for stream in (sys.stdin, sys.stderr) if stream.isatty()]
        return fds[0], fds[-1]
    stack.callback(os.close, fd)
    return fd, fd


class RawTerminal:
    """See `opened`."""

    def __init__(self, read_fd: int, write_fd: int, *, is_colored: bool) -> None:
        assert termios is not None
        self._termios = termios
        self._read_fd, self._write_fd = read_fd, write_fd
        self._is_colored = is_colored
        self._before = termios.tcgetattr(read_fd)
        self._keys = KeyReader()
        self._signals: list[int] = []
        self._shown: tuple[str, ...] = ()
        self._last_byte = time.monotonic()
        self._is_raw = self._is_gone = False
        self._wake_read = -1

    # On and off

    def enter(self) -> None:
        """Switch to raw mode and the alternate screen."""
        t = self._termios
        raw = [*self._before[:6], list(self._before[6])]
        raw[0] &= ~(t.BRKINT | t.ICRNL | t.INLCR | t.IGNCR | t.ISTRIP | t.IXON)
        raw[3] &= ~(t.ECHO | t.ICANON | t.IEXTEN | t.ISIG)
        raw[6][t.VMIN], raw[6][t.VTIME] = 1, 0
        self._is_raw = True
        self._set(raw)
        self._write(ENTER)
        self.repaint()

    def leave(self) -> None:
        """Restore the terminal; does nothing the second time."""
        if not self._is_raw:
            return
        self._is_raw = False
        self._write(LEAVE)
        # SIGTTOU would stop a background process and leave the terminal in raw mode
        ignored = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        try:
            self._set(self._before)
        finally:
            signal.signal(signal.SIGTTOU, ignored)

    def _set(self, attributes: list[Any]) -> None:
        try:
            # discard keys that were pressed for another screen
            self._termios.tcflush(self._read_fd, self._termios.TCIFLUSH)
            self._termios.tcsetattr(self._read_fd, self._termios.TCSANOW, attributes)
        except self._termios.error:
            self._is_gone = True

    def suspend(self) -> None:
        """See `Terminal`."""
        self.leave()
        ours = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.killpg(os.getpgrp(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, ours)  # continued
        self.enter()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Convert signals to events inside this block."""
        self._wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        os.set_blocking(self._wake_read, False)
        wakeup = signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        for signum in (*_ENDS, *_CHANGES):
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # nohup
                before[signum] = signal.signal(signum, self._note)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
            signal.set_wakeup_fd(wakeup)
            os.close(self._wake_read)
            os.close(wake_write)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._signals.append(signum)

    # Out

    def size(self) -> tuple[int, int]:
        """See `Terminal`."""
        try:
            columns, rows = os.get_terminal_size(self._write_fd)
        except OSError:
            return 80, 24
        return (columns, rows) if columns and rows else (80, 24)

    def repaint(self) -> None:
        """See `Terminal`."""
        self._shown = ()

    def draw(self, screen: Screen) -> None:
        """See `Terminal`; only rows that changed are sent."""
        painted, rows = paint(screen, self._shown, is_colored=self._is_colored)
        self._shown = rows
        self._write(painted)

    def _write(self, text: str) -> None:
        data = text.encode("utf-8", errors="replace")
        while data and not self._is_gone:
            try:
                data = data[os.write(self._write_fd, data) :]
            except OSError:  # the window was closed
                self._is_gone = True

    # In

    def forget_keys(self) -> None:
        """See `Terminal`."""
        with contextlib.suppress(self._termios.error):
            self._termios.tcflush(self._read_fd, self._termios.TCIFLUSH)

    def events(self, timeout: float | None) -> list[Event]:
        """See `Terminal`."""
        if self._is_gone:
            return [Ended(signal.SIGHUP)]
        if self._keys.is_waiting:
            timeout = min(timeout if timeout is not None else PASTE_SECONDS, ESCAPE_SECONDS)
        ready = select.select([self._read_fd, self._wake_read], [], [], timeout)[0]
        events: list[Event] = []
        if self._read_fd in ready:
            events += self._received()
        elif self._keys.is_waiting:
            events += self._keys.expire(time.monotonic() - self._last_byte)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        while self._signals:
            events += self._of_signal(self._signals.pop(0))
        return events

    def _received(self) -> list[Event]:
        try:
            received = os.read(self._read_fd, 65536)
        except OSError:
            received = b""
        self._last_byte = time.monotonic()
        if not received:
            self._is_gone = True
            return [Ended(signal.SIGHUP)]
        return list(self._keys.feed(received))

    def _of_signal(self, signum: int) -> list[Event]:
        if signum in _ENDS:
            return [Ended(signum)]
        if signum == signal.SIGTSTP:
            return [Suspended()]
        if signum == signal.SIGCONT:  # after SIGSTOP the terminal was not restored
            self.enter()
        return [Resized()]
