"""Ends a process that makes no progress: a reward function that hangs, a deadlock, an endpoint that never responds.

Code that completes a unit of work calls `beat`. A process that waits for others inside a collective is not watched
(`waiting`): the process it waits for is. The watchdog is a thread, since the main thread may hang in C code, where
Python's signal handlers never run. It prints the stack of every thread and ends the process at once; the next run
resumes from the last checkpoint.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_cli.echo import restore_echo
from rlhf_cli.errors import EXIT_STALLED
from rlhf_cli.run_log import write

_STDERR = 2
_last_beat = 0.0
_waits = 0


def beat() -> None:
    """Record that work was done; cheap enough for inner loops."""
    global _last_beat
    _last_beat = time.monotonic()


@contextmanager
def waiting() -> Iterator[None]:
    """Suspend the watchdog while this process waits for the others; the end of the wait counts as progress.

    Only the thread that does the work may enter it.
    """
    global _waits
    _waits += 1
    try:
        yield
    finally:
        beat()  # before the decrement, or the watchdog could see neither
        _waits -= 1


@contextmanager
def watching(seconds: float | None, what: str) -> Iterator[None]:
    """End the process with `EXIT_STALLED` if nothing calls `beat` for `seconds`; None never does.

    Time in which the process was stopped or not scheduled (SIGSTOP, a suspended machine) does not count.

    A call that hangs while it holds Python's global lock (a regular expression with exponential backtracking) stops the
    watchdog too; after twice the time, the interpreter's own timer prints the stacks and exits with 1.

    Args:
        seconds: `stall_seconds` of the recipe.
        what: name of the stage, for the message.
    """
    if seconds is None:
        yield
        return
    over = threading.Event()
    beat()
    _reset_timer(seconds)  # here too, since the thread may never get to it
    thread = threading.Thread(target=_watch, args=(seconds, what, over), name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        faulthandler.cancel_dump_traceback_later()


def _watch(seconds: float, what: str, over: threading.Event) -> None:
    interval = min(seconds / 10, 5.0)
    seen, idle, before = _last_beat, 0.0, time.monotonic()
    while not over.wait(interval):
        _reset_timer(seconds)
        now = time.monotonic()
        # At most two intervals per check: if more time passed, the whole process was stopped.
        idle = idle + min(now - before, 2 * interval) if _last_beat == seen and not _waits else 0.0
        seen, before = _last_beat, now
        if idle >= seconds:
            _end(seconds, what)


def _reset_timer(seconds: float) -> None:
    """Restart the interpreter's own timer, which needs no lock to fire."""
    faulthandler.dump_traceback_later(2 * seconds, exit=True, file=_STDERR)


def _end(seconds: float, what: str) -> None:
    """Print the stack of every thread and the reason; exit without cleanup, which could hang too."""
    faulthandler.dump_traceback(file=_STDERR, all_threads=True)
    text = (
        f"error: `{what}` made no progress for {seconds:g} seconds (`stall_seconds`); the stacks above show where it "
        "hangs\n"
        "\nhint: run the same command again to resume from the last checkpoint, or raise `stall_seconds`\n"
    )
    os.write(_STDERR, text.encode())
    write(text)
    restore_echo()
    os._exit(EXIT_STALLED)
