"""What a supervising process says of one that ended without reporting an error."""

from __future__ import annotations

import signal
import sys

from rlhf_cli.errors import ProcessDiedError

_SHOWN_LINES = 30


def show_last_output(process: str, output: bytes) -> None:
    """Print the last lines that a process wrote, if any; `process` names it."""
    if lines := output.decode(errors="replace").splitlines()[-_SHOWN_LINES:]:
        print(f"last output of {process}:", *lines, sep="\n  ", file=sys.stderr)


def died(process: str, code: int, *, resuming: str) -> ProcessDiedError:
    """Return the error of a process that ended without reporting one.

    Args:
        process: its name, for the message.
        code: its exit code; negative for the signal that killed it.
        resuming: what running the same command again does, after "run the same command again to resume".
    """
    if code >= 0:
        return ProcessDiedError(f"{process} ended with exit code {code} and reported no error", exit_code=code)
    why = "the system kills a process when memory runs out; " if -code == signal.SIGKILL else ""
    return ProcessDiedError(
        f"{process} was killed by {signal.Signals(-code).name}",
        exit_code=128 - code,
        hint=f"{why}run the same command again to resume{resuming}",
    )
