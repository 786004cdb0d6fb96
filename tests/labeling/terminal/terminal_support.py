"""Texts that terminals trip over, a terminal small enough to read in a minute, and a command to run in it."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

from hypothesis import strategies as st

NASTY = st.sampled_from(
    [
        "\x1b[31m", "\x1b]0;title\x07", "\x9b2J", "\u202e", "\u2066", "\u200b", "\u200d", "\ufe0f", "\U000e0041",
        "\ud800", "\r", "\t", "\x00", "\x7f", "日本語", "、", "👩‍👩‍👧", "👍🏽", "🇩🇪", "❤️", "e\u0301", "\u0301" * 9,
        "नमस्ते", "    ", "\n", "word", "a" * 30,
    ]
)  # fmt: skip
TEXTS = st.lists(NASTY | st.text(st.characters(), max_size=6), max_size=12).map("".join)

_DISPOSITIONS = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU,
)  # fmt: skip
_SEQUENCE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")
PROGRAM = """
import sys
from pathlib import Path
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.terminal import label_in_terminal
outcome = label_in_terminal(LabelSession(Path(sys.argv[1]), create=False), "Maria", resume_command="rlhf label",
    afterwards="now train")
print("outcome", outcome.end, outcome.signum)
"""


class Screen:
    """Rows of characters, and the few sequences that may change them; any other is an error."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[int, str]] = {}
        self.row = self.column = 0
        self.modes: dict[str, bool] = {}
        self._rest = ""

    def feed(self, text: str) -> None:
        """Obey what a program wrote."""
        text, self._rest = self._rest + text, ""
        at = 0
        while at < len(text):
            if text[at] != "\x1b":
                self._put(text[at])
                at += 1
                continue
            found = _SEQUENCE.match(text, at)
            if found is None:
                assert len(text) - at < 12, f"unknown sequence {text[at : at + 20]!r}"
                self._rest = text[at:]
                return
            self._obey(found[1], found[2])
            at = found.end()

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row += 1
        else:
            self.rows.setdefault(self.row, {})[self.column] = character
            self.column += 1

    def _obey(self, parameters: str, letter: str) -> None:
        numbers = [int(number or 1) for number in parameters.lstrip("?").split(";")]
        if letter == "H":
            self.row, self.column = numbers[0] - 1, numbers[-1] - 1 if len(numbers) > 1 else 0
        elif letter == "G":
            self.column = numbers[0] - 1
        elif letter == "A":
            self.row = max(0, self.row - numbers[0])
        elif letter == "K":
            self.rows.pop(self.row, None)
        elif letter == "J":
            self.rows = {}
        elif letter in "hl":
            self.modes[parameters] = letter == "h"
        else:
            assert letter == "m"

    def __str__(self) -> str:
        lines = []
        for number in range(max(self.rows, default=-1) + 1):
            row = self.rows.get(number, {})
            lines.append("".join(row.get(column, " ") for column in range(max(row, default=-1) + 1)))
        return "\n".join(lines)


class Terminal:
    """A program in a pseudo-terminal of its own session; `ignored` signals are ignored when it starts."""

    def __init__(
        self,
        store: Path,
        columns: int = 80,
        rows: int = 24,
        program: str = PROGRAM,
        ignored: tuple[signal.Signals, ...] = (),
    ) -> None:
        self.master, self.slave = pty.openpty()
        self.open_files: tuple[int, ...] = (self.master, self.slave)
        self.resize(columns, rows, tell=False)
        self.before = termios.tcgetattr(self.slave)
        self.screen = Screen()
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        environment = os.environ | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}

        def take_terminal() -> None:
            # What is ignored here is ignored there: SIGHUP under nohup, SIGINT and SIGQUIT behind a shell script's `&`.
            for signum in _DISPOSITIONS:
                signal.signal(signum, signal.SIG_IGN if signum in ignored else signal.SIG_DFL)
            os.setsid()
            fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(store)], stdin=self.slave, stderr=self.slave, stdout=subprocess.PIPE,
            env=environment, preexec_fn=take_terminal, text=True,
        )  # fmt: skip

    def resize(self, columns: int, rows: int, *, tell: bool = True) -> None:
        """Give the window another size."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if tell:
            self.process.send_signal(signal.SIGWINCH)

    def read(self, seconds: float = 0.02) -> None:
        """Take what the program writes."""
        while select.select([self.master], [], [], seconds)[0]:
            try:
                self.screen.feed(self._decode(os.read(self.master, 65536)))
            except OSError:
                return

    def wait_for(self, text: str, seconds: float = 15.0) -> None:
        """Wait until the screen shows a text."""
        until = time.monotonic() + seconds
        while text not in str(self.screen):
            assert time.monotonic() < until, f"no `{text}` in\n{self.screen}"
            self.read()

    def type(self, keys: str | bytes, then: str = "") -> None:
        """Press keys, and wait for what they bring."""
        os.write(self.master, keys.encode() if isinstance(keys, str) else keys)
        if then:
            self.wait_for(then)

    def ended(self) -> str:
        """Wait for the end; returns stdout. The terminal has to be as it was."""
        until = time.monotonic() + 15
        while self.process.poll() is None:
            assert time.monotonic() < until, f"still there:\n{self.screen}"
            self.read()
        self.read()
        assert termios.tcgetattr(self.slave) == self.before
        assert self.screen.modes["?1049"] is False
        assert self.screen.modes["?25"] is True
        assert self.screen.modes["?2004"] is False
        assert self.screen.modes["?7"] is True
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def close(self) -> None:
        """Leave nothing behind."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.hang_up()

    def hang_up(self) -> None:
        """Close the window. Once: by a second time the numbers may belong to somebody else's files."""
        for fd in self.open_files:
            os.close(fd)
        self.open_files = ()
