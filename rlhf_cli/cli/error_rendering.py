"""Print errors to stderr: `error: ...`, a blank line, `hint: ...`. Only bugs in rlhf print a traceback."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import traceback

from rlhf_cli.errors import EXIT_USAGE, ReportedError, RLHFError, WaitingForLabelsError


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
    if isinstance(error, BrokenPipeError):  # the reader of stdout has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    message = getattr(error, "format_message", None)
    if message is not None:  # usage errors of typer
        text = message()
        command = getattr(getattr(error, "ctx", None), "command_path", "rlhf")
        _print([text[:1].lower() + text[1:].rstrip(".")], f"`{command} --help` lists its options")
        return EXIT_USAGE
    traceback.print_exception(error)
    _print(["this is a bug in rlhf"], "please report it with the traceback above")
    return 1


def _print(messages: list[str], hint: str | None, label: tuple[str, str] = ("error", "31")) -> None:
    lines = [f"{_label(*label)} {_clean(message)}" for message in messages]
    if hint is not None:
        lines += ["", f"{_label('hint', '36')} {_clean(hint)}"]
    print("\n".join(map(_wrapped, lines)), file=sys.stderr, flush=True)


def _wrapped(line: str) -> str:
    """Wrap at words on a terminal; leave the line whole elsewhere, for programs that read lines."""
    if not sys.stderr.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return "\n".join(
        textwrap.fill(part, width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False)
        for part in line.split("\n")
    )


def _label(text: str, color: str) -> str:
    plain = not sys.stderr.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return f"{text}:" if plain else f"\033[1;{color}m{text}:\033[0m"


def _clean(text: str) -> str:
    """Escape terminal control sequences, since messages may quote untrusted files."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
