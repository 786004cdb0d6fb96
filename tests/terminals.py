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
    """The command in a pseudo-terminal; `text` is what it wrote, without control sequences."""

    def __init__(self, width: int, *arguments: str, height: int = 30, cwd: Path | None = None) -> None:
        self.master, slave = pty.openpty()
        ioctl(slave, TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "CI")}
        self.process = subprocess.Popen(
            [RLHF, *arguments],
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
        self.text = ""

    def until(self, pattern: str, seconds: float = 300) -> str:
        """Read until the screen shows a pattern; returns what came since the last call."""
        start, deadline = len(self.text), time.monotonic() + seconds
        while not re.search(pattern, self.text[start:]):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text[start:]!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                raw = os.read(self.master, 65536).decode(errors="replace")
                self.text += re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", raw)
        return self.text[start:]

    def type(self, keys: str) -> None:
        """Press keys; "\\n" is Enter."""
        os.write(self.master, keys.encode())
