"""Progress and messages on stderr: bars on a terminal, plain lines elsewhere. stdout is for data.

Bars show rate and time left. Under CI, or if stderr is not a terminal, a task prints one line when it starts, one every
30 seconds and one when it ends, so that logs stay readable.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from rlhf_cli.distributed.ranks import is_main
from rlhf_cli.distributed.watchdog import beat

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.progress import Task as RichTask

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[PX^_][^\x1b]*(?:\x1b\\)?|[@-Z\\-_])")
"""Terminal control: CSI, OSC, DCS/SOS/PM/APC and two-character sequences (ECMA-48)."""
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters except tab and line feed, and marks that change the direction of text."""


def interactive() -> bool:
    """Whether stderr is a terminal that a person may watch, and no CI variable is set."""
    return sys.stderr.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"


console = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty(), quiet=not is_main())
"""stderr, for everything but data; silent in all processes except rank 0."""


class Task:
    """Running work with a known number of units; created by `task`."""

    def __init__(self, label: str, total: int, unit: str, bar: Progress | None, done: int) -> None:
        self._label, self._total, self._unit, self._bar = label, total, unit, bar
        self._done, self._before = done, done
        self._began = self._spoke = time.monotonic()
        self._note = ""
        self._id: TaskID | None = None
        if bar is not None:
            self._id = bar.add_task(escape(label), total=total, completed=done, note="", rate="")

    def advance(self, units: int = 1, note: str | None = None) -> None:
        """Count `units` as done; `note` replaces the text at the end of the bar."""
        beat()
        self._done += units
        self._note = self._note if note is None else note
        if self._bar is not None and self._id is not None:
            rate = f"{self._rate():,.1f} {self._unit}/s"
            self._bar.update(self._id, advance=units, rate=rate, note=escape(self._note))
        elif time.monotonic() - self._spoke > _LINE_EVERY and self._done < self._total:
            self._spoke = time.monotonic()
            rate = self._rate()
            left = f"about {format_duration((self._total - self._done) / rate)} left" if rate else "none has ended yet"
            parts = [f"{self._done:,} of {self._total:,} {self._unit}", left, self._note]
            say(f"{self._label}: {', '.join(part for part in parts if part)}")

    def _rate(self) -> float:
        """Units per second in this process; units of an earlier attempt do not count."""
        return (self._done - self._before) / max(time.monotonic() - self._began, 1e-9)


_LINE_EVERY = 30.0
"""Seconds between two lines of a task in a log."""


@contextmanager
def task(label: str, total: int, unit: str = "steps", done: int = 0) -> Iterator[Task]:
    """Show the progress of `total` units of work; `done` of them are from an earlier attempt (a resumed stage)."""
    if not interactive():
        say(f"{label}: {total - done:,} {unit}")
        running = Task(label, total, unit, None, done)
        yield running
        say(f"{label}: done in {format_duration(time.monotonic() - running._began)}")
        return
    with _bar() as bar:
        yield Task(label, total, unit, bar, done)


def _bar() -> Progress:
    from rich.progress import (  # slow to import, and only tasks on a terminal need it
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column
    from rich.text import Text

    class TimeColumn(TimeRemainingColumn):
        """The time left; until that can be estimated, the time so far, which shows that work goes on."""

        def render(self, task: RichTask) -> Text:
            if task.finished or task.time_remaining is not None:
                return super().render(task)
            minutes, seconds = divmod(int(task.elapsed or 0), 60)
            return Text(f"{minutes}:{seconds:02d} so far", style="progress.elapsed")

    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", table_column=Column(no_wrap=True)),
        TimeColumn(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True)),
        TextColumn("[dim]{task.fields[note]}", table_column=Column(no_wrap=True, ratio=1)),
    )
    return Progress(*columns, console=console, transient=False, expand=True)


def format_duration(seconds: float) -> str:
    """Format seconds for people: 4.2 s, 3 min 05 s, 1 h 20 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def say(text: str) -> None:
    """Print one line on stderr."""
    console.print(text, markup=False)


@cache
def say_once(line: str) -> None:
    """Print a message, the first time only."""
    say(line)


def warn(text: str) -> None:
    """Print one warning on stderr."""
    console.print(f"[yellow]warning:[/yellow] {escape(text)}")


def printable(text: str) -> str:
    """The text without terminal control sequences and characters."""
    return _CONTROLS.sub("", _ESCAPES.sub("", text.replace("\r\n", "\n")))
