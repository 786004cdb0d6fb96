"""Ends a process that makes no progress: a reward that hangs, a deadlock, an endpoint that never answers.

Whatever gets something done calls `beat`. Of several processes, those that wait for another inside a collective are not
watched (`waiting`): the one they wait for has the work that must not stall. The watch is a thread of its own, since the
main one may hang in C code, where Python's signal handlers never run. It prints the stack of every thread and ends the
process at once; the stage goes on from its last checkpoint.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_cli.errors import EXIT_STALLED

_STDERR = 2
_last_beat = 0.0
_waits = 0


def beat() -> None:
    """Say that something got done; costs nothing, so that inner loops can call it."""
    global _last_beat
    _last_beat = time.monotonic()


@contextmanager
def waiting() -> Iterator[None]:
    """Suspend the watch while this process waits for the others, which may take as long as they get something done.

    A wait that ends is progress. Only the thread that does the work may enter it.
    """
    global _waits
    _waits += 1
    try:
        yield
    finally:
        beat()  # ahead of the count, or the watch could see neither
        _waits -= 1


@contextmanager
def watching(seconds: float | None, what: str) -> Iterator[None]:
    """End the process with `EXIT_STALLED` where nothing beats for so long; None waits for ever.

    Time in which the process was stopped or not scheduled (SIGSTOP, a suspended machine) does not count.

    A call that hangs without giving up Python's global lock (a regular expression that explodes) stops this thread too;
    after twice the time, the interpreter's own timer prints the stacks and ends the process with 1.

    Args:
        seconds: `stall_seconds` of the recipe.
        what: the stage, for the message.
    """
    if seconds is None:
        yield
        return
    over = threading.Event()
    beat()
    _wind_up(seconds)  # here too, since the thread may never come to it
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
        _wind_up(seconds)
        now = time.monotonic()
        # Two intervals at most for one look: if more went by, the whole process stood still.
        idle = idle + min(now - before, 2 * interval) if _last_beat == seen and not _waits else 0.0
        seen, before = _last_beat, now
        if idle >= seconds:
            _end(seconds, what)


def _wind_up(seconds: float) -> None:
    """Set the interpreter's own timer back to its start; it needs no lock to go off."""
    faulthandler.dump_traceback_later(2 * seconds, exit=True, file=_STDERR)


def _end(seconds: float, what: str) -> None:
    """Print where every thread is, then why; leave without any clean-up, which could hang as well."""
    faulthandler.dump_traceback(file=_STDERR, all_threads=True)
    text = (
        f"error: `{what}` made no progress for {seconds:g} seconds (`stall_seconds`); the stacks above say where it "
        "is\n"
        "\nhint: run the same command again to go on from the last checkpoint, or raise `stall_seconds`\n"
    )
    os.write(_STDERR, text.encode())
    os._exit(EXIT_STALLED)
