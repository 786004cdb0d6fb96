"""Progress and messages on stderr: bars on a terminal, plain lines elsewhere. stdout is for data.

Bars show rate and time left, and move within long units such as the steps of PPO (`Task.within`). A time left with `~`
rests on a guess: not one unit has ended yet. Under CI, or if stderr is not a terminal, a task prints one line when it
starts, one every 30 seconds and one when it ends, so that logs stay readable. `recorded` also writes the running tasks
to a file, from which another process shows them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True)
class _Inside:
    """What is known of the units that are running; see `Task.within`."""

    units: float = 0.0
    doing: str = ""
    rate: str = ""
    left: float | None = None
    is_guess: bool = True


class Task:
    """Running work with a known number of units; created by `task`."""

    def __init__(self, label: str, total: int, unit: str, bar: Progress | None, done: int) -> None:
        self._label, self._total, self._unit, self._bar = label, total, unit, bar
        self._done, self._ran = done, 0
        self._began = self._spoke = self._moved = time.monotonic()
        self._note, self._inside = "", _Inside()
        self._id: TaskID | None = None
        if bar is not None:
            self._id = bar.add_task(escape(label), total=total, completed=done, owner=self, **self._fields())

    def advance(self, units: int = 1, note: str | None = None) -> None:
        """Count `units` as done; `note` replaces the text at the end of the bar."""
        self._done += units
        self._ran += units
        self._note = self._note if note is None else note
        if units:
            self._inside = _Inside()
            self._moved = time.monotonic()
        self._show()

    def back(self, units: int) -> None:
        """Count `units` as not done: they run again. The time that they took still tells how long a unit takes."""
        self._done -= units
        self._inside = _Inside()
        self._show()

    def within(
        self,
        units: float,
        doing: str,
        *,
        ended: int = 0,
        rate: str = "",
        left: float | None = None,
        is_guess: bool | None = None,
    ) -> None:
        """Show how far the units are that are running.

        Args:
            units: how much of them is done, in units, such as 0.25 of a step.
            doing: what is being done, in a few words.
            ended: units to count as done, as `advance` does.
            rate: how fast.
            left: seconds left of the whole task; None takes the time per unit so far, parts of units included.
            is_guess: whether the time left rests on more than what was measured; None where no unit is done.
        """
        self._done += ended
        self._ran += ended
        self._inside = _Inside(units, doing, rate, left, not self._ran if is_guess is None else is_guess)
        self._moved = time.monotonic()
        self._show()

    def _show(self) -> None:
        beat()
        _record.write()
        now = time.monotonic()
        if self._bar is not None and self._id is not None:
            done = min(max(self._done + self._inside.units, 0), self._total)
            self._bar.update(self._id, completed=done, **self._fields())
        elif now - self._spoke > _LINE_EVERY and self._done < self._total:
            self._spoke = now
            known = self._left()
            if known is None:
                left = f"{format_duration(now - self._began)} so far"
            else:
                left = f"{'~' if known[1] else 'about '}{format_duration(known[0])} left"
            inside = self._inside
            doing = _listed(inside.doing, inside.rate)
            parts = [f"{self._done:,} of {_counted(self._total, self._unit)}", doing, left, self._note]
            say(f"{self._label}: {', '.join(part for part in parts if part)}")

    def _fields(self) -> dict[str, Any]:
        """Return the texts of the bar."""
        inside = self._inside
        return {
            "count": f"{self._done:,}/{self._total:,}",
            "rate": "" if inside.doing else self._rate(),
            "note": escape(_listed(inside.doing, inside.rate, self._note)),
        }

    def _rate(self) -> str:
        """Return units per second in this process; units of an earlier attempt do not count."""
        rate = self._ran / max(self._moved - self._began, 1e-9)
        return f"{rate:,.1f} {self._unit}/s" if rate >= 0.1 or not rate else f"{1 / rate:,.0f} s each"

    def _left(self) -> tuple[float, bool] | None:
        """Return the seconds left and whether they are a guess; None without anything to go by."""
        inside, now = self._inside, time.monotonic()
        if inside.left is not None:
            return max(inside.left - (now - self._moved), 0.0), inside.is_guess
        ran = self._ran + inside.units
        if ran <= 0:
            return None
        seconds_each = (self._moved - self._began) / ran
        to_come = (self._total - self._done - inside.units) * seconds_each
        return max(to_come - (now - self._moved), 0.0), not self._ran

    def as_json(self) -> dict[str, Any]:
        """Return what the bar shows, for another process; `seconds_left` is null until it can be estimated."""
        known, inside = self._left(), self._inside
        return {
            "label": self._label,
            "done": self._done,
            "total": self._total,
            "unit": self._unit,
            "doing": _listed(inside.doing, inside.rate, self._note),
            "seconds_left": None if known is None else round(known[0], 1),
            "is_guess": known is not None and known[1],
        }

    def time_text(self) -> str:
        """Return the time left; until that can be estimated, the time so far, which shows that work goes on."""
        so_far = format_clock(time.monotonic() - self._began)
        if self._done >= self._total:
            return so_far
        known = self._left()
        return f"{so_far} so far" if known is None else f"{'~' if known[1] else ''}{format_clock(known[0])} left"


def _listed(*texts: str) -> str:
    return " \u00b7 ".join(text for text in texts if text)


def _counted(count: int, units: str) -> str:
    """Return a number with its unit, given in the plural."""
    return f"{count:,} {units.removesuffix('s') if count == 1 else units}"


_LINE_EVERY = 30.0
"""Seconds between two lines of a task in a log."""


class _Record:
    """The file of `recorded`: which tasks are running, and how far they are."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.stage: str | None = None
        self.running: list[Task] = []
        self._wrote = 0.0

    def write(self, *, at_once: bool = False) -> None:
        """Write the file, unless that was done within the last second."""
        now = time.monotonic()
        if self.path is None or (now - self._wrote < _RECORD_EVERY and not at_once):
            return
        self._wrote = now
        content = {"host": socket.gethostname(), "time": time.time(), "stage": self.stage}
        content["tasks"] = [task.as_json() for task in self.running]
        temporary = self.path.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # it is only for display; the stage itself reports a failing disk
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.replace(self.path)  # not durable, which `write_whole` would wait for


_record = _Record()
_RECORD_EVERY = 1.0
"""Seconds between two writes of the file of `recorded`, at least."""


@contextmanager
def recorded(path: Path) -> Iterator[None]:
    """Keep a file with the running tasks during a run, in the main process; it is removed at the end.

    Args:
        path: the file: `{host, time, stage, tasks}`, time in seconds since 1970, tasks as in `Task.as_json`.
    """
    if not is_main():
        yield
        return
    _record.path, _record.stage = path, None
    _record.write(at_once=True)
    try:
        yield
    finally:
        _record.path = None
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def begin_stage(name: str) -> None:
    """Name the stage that begins, in the file of `recorded`."""
    _record.stage = name
    _record.write(at_once=True)


@contextmanager
def task(label: str, total: int, unit: str = "steps", done: int = 0) -> Iterator[Task]:
    """Show the progress of `total` units of work; `done` of them are from an earlier attempt (a resumed stage)."""
    with _shown(label, total, unit, done) as running:
        _record.running.append(running)
        _record.write(at_once=True)
        try:
            yield running
        finally:
            _record.running.remove(running)
            _record.write(at_once=True)


@contextmanager
def _shown(label: str, total: int, unit: str, done: int) -> Iterator[Task]:
    if not interactive():
        say(f"{label}: {_counted(total - done, unit)}")
        running = Task(label, total, unit, None, done)
        yield running
        say(f"{label}: done in {format_duration(time.monotonic() - running._began)}")
        return
    with _bar() as bar:
        yield Task(label, total, unit, bar, done)


def _bar() -> Progress:
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn  # slow to import; only terminals need it
    from rich.table import Column
    from rich.text import Text

    class TimeColumn(ProgressColumn):
        """See `Task.time_text`."""

        def render(self, task: RichTask) -> Text:
            return Text(task.fields["owner"].time_text(), style="progress.remaining")

    def column() -> Column:
        return Column(no_wrap=True)

    columns = (
        TextColumn("{task.description}", table_column=column()),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[count]}", style="progress.download", table_column=column()),
        TextColumn("{task.fields[rate]}", table_column=column()),
        TimeColumn(table_column=column()),
        TextColumn("[dim]{task.fields[note]}", table_column=Column(no_wrap=True, ratio=1)),
    )
    return Progress(*columns, console=console, transient=False, expand=True)


def format_clock(seconds: float) -> str:
    """Format seconds as a clock does: 0:04, 12:05, 1:20:00."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


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
def say_once(text: str) -> None:
    """Print one line on stderr, the first time in this process."""
    say(text)


def warn(text: str) -> None:
    """Print one warning on stderr."""
    console.print(f"[yellow]warning:[/yellow] {escape(text)}")


def printable(text: str) -> str:
    """The text without terminal control sequences and characters."""
    return _CONTROLS.sub("", _ESCAPES.sub("", text.replace("\r\n", "\n")))
