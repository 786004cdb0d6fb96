"""What a command says about an error: a message, a hint, a code for programs and the exit code."""

from __future__ import annotations

import errno
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.cli.given_paths import is_given
from rlhf_cli.cli.option_values import refused_number
from rlhf_cli.distributed import peers
from rlhf_cli.distributed.process_group import is_lost_peer
from rlhf_cli.errors import (
    EXIT_DISK,
    DiskError,
    Interrupted,
    RLHFError,
    UsageError,
    WaitingForLabelsError,
)
from rlhf_cli.memory import is_out_of_memory

VERSION = 1
"""Version of the object of `ErrorReport.as_json`; increased when a field is removed or means something else."""

_HINTS = {
    errno.EACCES: "change the permissions, or use a path that you have access to",
    errno.EPERM: "change the permissions or attributes, or use a path that you have access to",
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
    errno.EEXIST: "the path exists already: move it away, or use another one",
    errno.ENOTEMPTY: "another program writes to this folder: close it and repeat the command",
    errno.EBUSY: "another program uses this file: close that program and repeat the command",
    errno.EMFILE: "too many files are open (`ulimit -n`): raise the limit",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENOMEM: "too little memory: close other programs, or use a smaller model or batch",
}
"""What a user can do about errors of the system that no command foresaw."""
_OF_A_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY}
"""Errors that a wrong path causes: the user's mistake only where the user gave the path."""
_DISK = {errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE}


@dataclass(frozen=True)
class ErrorReport:
    """What is said about an error.

    Attributes:
        code: kind of the error, for programs; docs/guide.md lists them.
        exit_code: of the command.
        messages: one per problem.
        hint: how to fix it.
        is_bug: whether rlhf is to blame; the traceback is printed too.
    """

    code: str
    exit_code: int
    messages: tuple[str, ...]
    hint: str | None = None
    is_bug: bool = False

    @property
    def is_waiting(self) -> bool:
        """Whether nothing is wrong: people have yet to label."""
        return self.code == WaitingForLabelsError.code

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints; docs/guide.md describes it."""
        message, hint = "\n".join(self.messages), self.hint
        return {"version": VERSION, "code": self.code, "exit_code": self.exit_code, "message": message, "hint": hint}


def describe(error: BaseException) -> ErrorReport:
    """Return what is said about an exception."""
    if isinstance(error, RLHFError):
        return _of_ours(error)
    if isinstance(error, KeyboardInterrupt):
        hint = "run the same command again to resume from the last checkpoint"
        return ErrorReport(Interrupted.code, 130, ("stopped by SIGINT",), hint)
    message = getattr(error, "format_message", None)
    if message is not None:  # usage errors of typer
        command = getattr(getattr(error, "ctx", None), "command_path", "rlhf")
        said = refused_number(error) or _in_our_style(message())
        return ErrorReport(UsageError.code, UsageError.exit_code, (said,), f"`{command} --help` lists its options")
    if (known := _environment_problem(error)) is not None:
        return _of_ours(known)
    return ErrorReport("bug", 1, ("this is a bug in rlhf",), "please report it with the traceback above", is_bug=True)


def describe_stdout(error: OSError) -> ErrorReport:
    """Return what is said about an error of writing to stdout."""
    hint, code = _HINTS.get(error.errno or 0), EXIT_DISK if error.errno in _DISK else 1
    return ErrorReport("stdout", code, (f"cannot write to stdout: {_reason(error)}",), hint)


def _of_ours(error: RLHFError) -> ErrorReport:
    return ErrorReport(error.code, error.exit_code, tuple(error.problems) or (error.message,), error.hint)


def _in_our_style(text: str) -> str:
    """Begin a message of typer in lower case, and end it without a full stop."""
    return (text[:1].lower() + text[1:]).replace(". Did you mean", ", did you mean").rstrip(".")


def _environment_problem(error: BaseException) -> RLHFError | None:
    """Return what a user can do something about, for an exception of Python or a library; None for a bug."""
    if isinstance(error, UnicodeEncodeError) and error.reason.startswith("surrogates"):
        return UsageError(
            f"a path is not valid UTF-8: `{ascii(error.object[:200])[1:-1]}`",
            hint="rename the file or folder, or work in another one",
        )
    if is_lost_peer(error):
        unknown = RLHFError("another process has ended", hint="the error of that process says why")
        return peers.explain() or unknown
    if is_out_of_memory(error):
        return RLHFError("out of memory", hint="close other programs, or use a smaller model or batch")
    if isinstance(error, OSError) and (hint := _HINTS.get(error.errno or 0)) is not None:
        named = [path for path in (error.filename, error.filename2) if path is not None]
        if error.errno in _OF_A_PATH and named and not any(map(is_given, named)):
            return None
        paths = " -> ".join(map(str, named))
        kind = DiskError if error.errno in _DISK else RLHFError
        where = f"{paths}: " if paths else f"{_raised_in(error)}: "
        return kind(f"{where}{_reason(error)}", hint=f"{hint}; `--verbose` shows where it happened")
    if isinstance(error, ImportError) and not (error.name or "").startswith("rlhf_cli"):
        return RLHFError(
            f"cannot import {error.name or 'a library'}: {str(error).partition(chr(10))[0]}",
            hint="`rlhf doctor` shows the installed versions; reinstall rlhf to get the versions it needs",
        )
    return None


def _raised_in(error: BaseException) -> str:
    """Return the function of ours that was running, for errors of the system that name no path."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "rlhf_cli" in frame.filename]
    return f"in {Path(frames[-1].filename).name}, {frames[-1].name}" if frames else "a system call"


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
