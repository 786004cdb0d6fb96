"""What a person sees while something runs: bars on a terminal, plain lines elsewhere, nothing on stdout.

Bars show rate and time left. Under CI or when stderr is no terminal there are no bars: one line when a task begins and
one when it ends, so that logs stay readable.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def interactive() -> bool:
    """Whether a person watches: stderr is a terminal and no CI variable is set."""
    return sys.stderr.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"


console = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
"""Everything but data goes here: stderr."""


class Task:
    """A running piece of work with a known number of units."""

    def __init__(self, label: str, total: int, unit: str, bar: Progress | None, done: int) -> None:
        self._label, self._total, self._unit, self._bar = label, total, unit, bar
        self._done = done
        self._began = time.monotonic()
        self._id: TaskID | None = None
        if bar is not None:
            self._id = bar.add_task(label, total=total, completed=done, note="", rate="")

    def advance(self, units: int = 1, note: str | None = None) -> None:
        """Count `units` more as done; `note` replaces the text at the end of the bar."""
        self._done += units
        if self._bar is not None and self._id is not None:
            rate = self._done / max(time.monotonic() - self._began, 1e-9)
            fields = {"rate": f"{rate:,.1f} {self._unit}/s"} | ({} if note is None else {"note": note})
            self._bar.update(self._id, advance=units, **fields)


@contextmanager
def task(label: str, total: int, unit: str = "steps", done: int = 0) -> Iterator[Task]:
    """Show the progress of `total` units of work, `done` of which were done before (a resumed stage)."""
    if not interactive():
        console.print(f"{label}: {total - done:,} {unit}", markup=False)
        running = Task(label, total, unit, None, done)
        yield running
        console.print(f"{label}: done in {time.monotonic() - running._began:.1f} s", markup=False)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=False) as bar:
        yield Task(label, total, unit, bar, done)


def say(text: str) -> None:
    """Print one line for people, on stderr."""
    console.print(text, markup=False)


def warn(text: str) -> None:
    """Print one warning for people, on stderr."""
    console.print(f"[yellow]warning:[/yellow] {_escape(text)}")


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
