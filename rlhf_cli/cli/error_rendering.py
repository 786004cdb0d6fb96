"""Print errors to stderr: `error: ...`, a blank line, `hint: ...`; with `--json`, also as an object on stdout.

Bugs in rlhf print a traceback; `--verbose` prints that of every error.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import textwrap
import traceback
from typing import Any, TextIO

from rlhf_cli.cli.error_report import ErrorReport, describe, describe_stdout
from rlhf_cli.distributed.ranks import is_main
from rlhf_cli.errors import Interrupted, ReportedError, WaitingForLabelsError
from rlhf_cli.verbosity import is_verbose


def report(error: BaseException) -> int:
    """Print an error and return the exit code."""
    if isinstance(error, ReportedError):
        _print_json(error.plain)
        return error.exit_code
    if isinstance(error, OSError) and _is_of_stdout(error):
        found = describe_stdout(error)
        if not isinstance(error, BrokenPipeError):  # a reader that has closed stdout has seen enough
            _print(found)
        return found.exit_code
    found = print_error(error)
    _print_json(found.as_json())
    return found.exit_code


def print_error(error: BaseException) -> ErrorReport:
    """Print an error to stderr alone, and return what was printed."""
    found = describe(error)
    is_expected = isinstance(error, KeyboardInterrupt | Interrupted | WaitingForLabelsError)
    if found.is_bug or (is_verbose() and not is_expected):
        traceback.print_exception(error)
    _print(found)
    return found


def _print_json(plain: dict[str, Any]) -> None:
    """Print the only object on stdout of a command that was given `--json`."""
    if "--json" not in sys.argv[1:] or not is_main():
        return
    try:
        print(json.dumps({"error": plain}, indent=2, ensure_ascii=False), flush=True)
    except OSError:
        _to_null_device(sys.stdout)


def _is_of_stdout(error: OSError) -> bool:
    """Whether stdout could not be written; if so, it is the null device from now on."""
    frames = traceback.extract_tb(error.__traceback__)
    found = error.filename is None and bool(frames) and frames[-1].name in ("echo", "main")  # of click, and ours
    try:
        sys.stdout.flush()
    except OSError:
        found = True
    if found:
        _to_null_device(sys.stdout)
    return found


def _to_null_device(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print(found: ErrorReport) -> None:
    label = ("waiting", "33") if found.is_waiting else ("error", "31")
    lines = [f"{_label(*label)} {_clean(message)}" for message in found.messages]
    if found.hint is not None:
        lines += ["", f"{_label('hint', '36')} {_clean(found.hint)}"]
    try:
        print("\n".join(map(_wrapped, lines)), file=sys.stderr, flush=True)
    except OSError:  # nobody reads it, or its disk is full; the exit code remains
        _to_null_device(sys.stderr)


def _wrapped(line: str) -> str:
    """Wrap at words on a terminal; leave the line whole elsewhere, for programs that read lines.

    An indented line is a command to copy: it stays whole.
    """
    if not sys.stderr.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return "\n".join(part if part.startswith("    ") else _fill(part, width) for part in line.split("\n"))


def _fill(line: str, width: int) -> str:
    """Wrap at words, without counting the characters of colors."""
    colored = re.match(r"\033\[[\d;]*m([^\033]*)\033\[0m", line)
    plain = line if colored is None else colored[1] + line[colored.end() :]
    filled = textwrap.fill(plain, width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False)
    return filled if colored is None else colored[0] + filled.removeprefix(colored[1])


def _label(text: str, color: str) -> str:
    plain = not sys.stderr.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return f"{text}:" if plain else f"\033[1;{color}m{text}:\033[0m"


def _clean(text: str) -> str:
    """Escape terminal control sequences, since messages may quote untrusted files."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
