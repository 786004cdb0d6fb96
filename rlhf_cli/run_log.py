"""The log of a run, `log.txt` in its directory: every message that is shown on stderr, each line with its time in UTC.

The process that holds the run directory appends to the file, also when it resumes; other ranks write nothing. What
programs and libraries write to `sys.stderr` is included, since a stage may call code of the user. Redrawn progress bars
are not: `progress` writes lines in their place, as it does without a terminal.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, cast

from rlhf_cli.plain_text import printable

LOG = "log.txt"

_file: int | None = None
_stays_open = False


@contextmanager
def logged(path: Path, heading: str) -> Iterator[None]:
    """Append messages to a log, from here on in this process.

    After an exception the log stays open, so that the message of the error gets into it; `close` ends it.

    Args:
        path: the file; created if missing.
        heading: first line of this attempt.
    """
    open_log(path)
    write(heading)
    yield
    if not _stays_open:
        close()


def open_log(path: Path) -> None:
    """Append messages to a log until `close`."""
    global _file
    _close_file()
    with contextlib.suppress(OSError):  # a failing disk is reported by the stage that needs it
        _file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    if not isinstance(sys.stderr, _Tee):
        sys.stderr = cast(TextIO, _Tee(sys.stderr))


def stay_open() -> None:
    """Let the log stay open after `logged`, for what the command says about the finished run."""
    global _stays_open
    _stays_open = True


def close() -> None:
    """Close the log, if one is open, and let stderr be what it was."""
    global _stays_open
    if isinstance(sys.stderr, _Tee):
        sys.stderr = sys.stderr.end()
    _close_file()
    _stays_open = False


def _close_file() -> None:
    """Close the file of the log, if one is open."""
    global _file
    if _file is not None:
        os.close(_file)
        _file = None


def is_open() -> bool:
    """Whether messages are logged."""
    return _file is not None


def write(text: str) -> None:
    """Append lines to the log, if one is open. A signal handler may call it: there is no buffer and no lock."""
    if _file is None or not text.strip():
        return
    at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    lines = [f"{at}  {line}".rstrip() for line in printable(text).strip("\n").split("\n")]
    with contextlib.suppress(OSError):  # see `open_log`
        os.write(_file, "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))


def under(stream: Any) -> Any:
    """Return the stream under that of the log: what is written to it is not logged."""
    return stream.stream if isinstance(stream, _Tee) else stream


def _last_picture(line: str) -> str:
    """Return what is seen of a line: a bar ends each of its pictures but the last with a carriage return."""
    return line[line.rstrip("\r").rfind("\r") + 1 :]


class _Tee:
    """stderr, while a log is open: whole lines are logged too.

    Args:
        stream: stderr as it was.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._begun = ""

    def write(self, text: str) -> int:
        *lines, begun = (self._begun + text).split("\n")
        self._begun = _last_picture(begun)
        write("\n".join(_last_picture(line).rstrip("\r") for line in lines))
        return self.stream.write(text)

    def end(self) -> TextIO:
        """Log a line that was not ended, and return the stream."""
        write(self._begun)
        return self.stream

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
