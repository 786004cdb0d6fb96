"""Print errors to stderr: `error: ...`, a blank line, `hint: ...`. Only bugs in rlhf print a traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import textwrap
import traceback
from pathlib import Path
from typing import TextIO

from rlhf_cli.cli.given_paths import is_given
from rlhf_cli.distributed.process_group import is_lost_peer
from rlhf_cli.errors import (
    EXIT_DISK,
    EXIT_USAGE,
    DiskError,
    ReportedError,
    RLHFError,
    UsageError,
    WaitingForLabelsError,
)
from rlhf_cli.memory import is_out_of_memory

_HINTS = {
    errno.EACCES: "change the permissions, or use a path that you may use",
    errno.EPERM: "change the permissions or attributes, or use a path that you may use",
    errno.EROFS: "the file system is mounted read-only: use another path",
    errno.ENOSPC: "free some space, or use another disk",
    errno.EDQUOT: "your quota is used up: free some space, or use another disk",
    errno.EFBIG: "the system limits the size of files (`ulimit -f`): raise the limit, or use another disk",
    errno.EIO: "the disk or network share fails: check it (`dmesg`), or use another one",
    errno.ESTALE: "the network share was lost: mount it again",
    errno.ENAMETOOLONG: "use a shorter name or path",
    errno.ELOOP: "symbolic links point to one another: correct them",
    errno.ENOTDIR: "a part of the path is a file: use another path",
    errno.EISDIR: "the path is a folder: name a file",
    errno.ENOENT: "a file or folder does not exist, or was removed meanwhile: check the path",
    errno.EEXIST: "move it away, or use another path",
    errno.ENOTEMPTY: "another program writes to this folder: end it, and repeat the command",
    errno.EBUSY: "another program uses it: end it, and repeat the command",
    errno.EMFILE: "too many files are open (`ulimit -n`): raise the limit",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENOMEM: "memory is short: end other programs, or use a smaller model or batch",
}
"""What a user can do about errors of the system that no command foresaw."""
_OF_A_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY}
"""Errors that a wrong path causes: the user's mistake only where the user gave the path."""
_DISK = {errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE}


def report(error: BaseException) -> int:
    """Print an error and return the exit code."""
    if isinstance(error, ReportedError):
        return error.exit_code
    if isinstance(error, WaitingForLabelsError):
        _print([error.message], error.hint, label=("waiting", "33"))
        return error.exit_code
    if isinstance(error, RLHFError):
        _print(list(error.problems) or [error.message], error.hint)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        _print(["stopped by SIGINT"], "run the same command again to resume from the last checkpoint")
        return 130
    if isinstance(error, OSError) and _is_of_stdout(error):
        if not isinstance(error, BrokenPipeError):  # a reader that has closed stdout has seen enough
            _print([f"cannot write to stdout: {_reason(error)}"], _HINTS.get(error.errno or 0))
        return EXIT_DISK if error.errno in _DISK else 1
    message = getattr(error, "format_message", None)
    if message is not None:  # usage errors of typer
        text = message()
        command = getattr(getattr(error, "ctx", None), "command_path", "rlhf")
        _print([text[:1].lower() + text[1:].rstrip(".")], f"`{command} --help` lists its options")
        return EXIT_USAGE
    if (known := _environment_problem(error)) is not None:
        _print([known.message], known.hint)
        return known.exit_code
    traceback.print_exception(error)
    _print(["this is a bug in rlhf"], "please report it with the traceback above")
    return 1


def _environment_problem(error: BaseException) -> RLHFError | None:
    """Return what a user can do something about, for an exception of Python or a library; None for a bug."""
    if isinstance(error, UnicodeEncodeError) and error.reason.startswith("surrogates"):
        return UsageError(
            f"a path is not valid UTF-8: `{ascii(error.object[:200])[1:-1]}`",
            hint="rename the file or folder, or work in another one",
        )
    if is_lost_peer(error):
        return RLHFError("another process has ended", hint="the error of that process says why")
    if is_out_of_memory(error):
        return RLHFError("out of memory", hint="end other programs, or use a smaller model or batch")
    if isinstance(error, OSError) and (hint := _HINTS.get(error.errno or 0)) is not None:
        named = [path for path in (error.filename, error.filename2) if path is not None]
        if error.errno in _OF_A_PATH and named and not any(map(is_given, named)):
            return None
        paths = " -> ".join(map(str, named))
        kind = DiskError if error.errno in _DISK else RLHFError
        where = f"{paths}: " if paths else f"{_raised_in(error)}: "
        return kind(f"{where}{_reason(error)}", hint=f"{hint}; RLHF_DEBUG=1 shows where it happened")
    if isinstance(error, ImportError) and not (error.name or "").startswith("rlhf_cli"):
        return RLHFError(
            f"cannot import {error.name or 'a library'}: {str(error).partition(chr(10))[0]}",
            hint="`rlhf doctor` shows the installed versions; install rlhf again to get those that it needs",
        )
    return None


def _raised_in(error: BaseException) -> str:
    """Return the function of ours that was running, for errors of the system that name no path."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "rlhf_cli" in frame.filename]
    return f"in {Path(frames[-1].filename).name}, {frames[-1].name}" if frames else "a system call"


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


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _print(messages: list[str], hint: str | None, label: tuple[str, str] = ("error", "31")) -> None:
    lines = [f"{_label(*label)} {_clean(message)}" for message in messages]
    if hint is not None:
        lines += ["", f"{_label('hint', '36')} {_clean(hint)}"]
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
