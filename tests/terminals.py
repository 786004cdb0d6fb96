"""The real command in a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import struct
import subprocess
import time
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

from tests.preloaded import RLHF


class Terminal:
    """The command in a pseudo-terminal; `text` is what it wrote, without control sequences, and `raw` with them."""

    def __init__(
        self, width: int, *arguments: str, height: int = 30, cwd: Path | None = None, program: str = RLHF
    ) -> None:
        self.master, slave = pty.openpty()
        ioctl(slave, TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "CI")}
        self.process = subprocess.Popen(
            [program, *arguments],
            cwd=cwd,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment | {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            # A shell that started the tests in the background lets them ignore it, and programs inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(slave)
        self.text = self.raw = ""

    def until(self, pattern: str, seconds: float = 300) -> str:
        """Read until the screen shows a pattern; returns what came since the last call."""
        start, deadline = len(self.text), time.monotonic() + seconds
        while not re.search(pattern, self.text[start:]):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text[start:]!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                raw = os.read(self.master, 65536).decode(errors="replace")
                self.raw += raw
                self.text += re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", raw)
        return self.text[start:]

    def type(self, keys: str) -> None:
        """Press keys; "\\n" is Enter."""
        os.write(self.master, keys.encode())


def screen_of(text: str, width: int) -> list[str]:
    """Return the lines that a terminal shows of what was written to it: text, cursor up, erase line, returns.

    A line that is full wraps before the next character, as in terminals.
    """
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[^\x1b]", text.replace("\r\n", "\n")):
        if token[0] == "\x1b":
            count = int(re.sub(r"\D", "", token) or 1)
            row = max(row - count, 0) if token[-1] == "A" else row
            lines[row] = "" if token[-1] == "K" else lines[row]
            continue
        if token == "\r":
            column = 0
            continue
        if token == "\n" or column == width:
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        if token != "\n":
            lines[row] = f"{lines[row][:column]:<{column}}{token}{lines[row][column + 1 :]}"
            column += 1
    return [line.rstrip() for line in lines]
