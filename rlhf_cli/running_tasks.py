"""The running tasks of this process: what a request to stop waits for, and a file that other processes show."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rlhf_cli.distributed.ranks import is_main

_WRITE_EVERY = 1.0
"""Seconds between two writes of the file of `recorded`, at least."""


class ListedTask(Protocol):
    """What is asked of a task, see `progress.Task`."""

    saves: bool

    def as_json(self) -> dict[str, Any]:
        """Return what other processes show of it."""
        ...

    def until_saved(self) -> str:
        """Return after what a request to stop is honored."""
        ...


class _Running:
    """The tasks, and the file of `recorded`."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.stage: str | None = None
        self.tasks: list[ListedTask] = []
        self._wrote = 0.0

    def write(self, *, at_once: bool = False) -> None:
        """Write the file, unless that was done within the last second."""
        now = time.monotonic()
        if self.path is None or (now - self._wrote < _WRITE_EVERY and not at_once):
            return
        self._wrote = now
        content = {"host": socket.gethostname(), "time": time.time(), "stage": self.stage}
        content["tasks"] = [task.as_json() for task in self.tasks]
        temporary = self.path.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # it is only for display; the stage itself reports a failing disk
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.replace(self.path)  # not durable, which `write_whole` would wait for


_running = _Running()


@contextmanager
def recorded(path: Path) -> Iterator[None]:
    """Keep a file with the running tasks during a run, in the main process; it is removed at the end.

    Args:
        path: the file: `{host, time, stage, tasks}`, time in seconds since 1970, tasks as in `ListedTask.as_json`.
    """
    if not is_main():
        yield
        return
    _running.path, _running.stage = path, None
    _running.write(at_once=True)
    try:
        yield
    finally:
        _running.path = None
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def listed(task: ListedTask) -> Iterator[None]:
    """List a task while it runs."""
    _running.tasks.append(task)
    _running.write(at_once=True)
    try:
        yield
    finally:
        _running.tasks.remove(task)
        _running.write(at_once=True)


def show_change() -> None:
    """Show other processes that a task has moved, at most once per second."""
    _running.write()


def begin_stage(name: str) -> None:
    """Name the stage that begins, in the file of `recorded`."""
    _running.stage = name
    _running.write(at_once=True)


def what_is_saved() -> str | None:
    """Return after what the running work would stop on request; None if it would save nothing by that."""
    return next((task.until_saved() for task in _running.tasks if task.saves), None)
