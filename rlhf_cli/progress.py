"""Progress and messages on stderr: bars on a terminal, plain lines elsewhere. stdout is for data.

Bars show rate and time left, and move within long units such as the steps of PPO (`Task.within`). A time left with `~`
rests on a guess: not one unit has ended yet. Under CI, or if stderr is not a terminal, a task prints one line when it
starts, one every 30 seconds and one when it ends, so that logs stay readable. The log of the run (`run_log`) gets these
lines in any case, and all messages, also those that `--quiet` hides. Running tasks are listed in `running_tasks`, which
other processes read.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from rlhf_cli.bar_text import BarText
from rlhf_cli.console import bar_of_tasks, console, interactive
from rlhf_cli.distributed.watchdog import beat
from rlhf_cli.durations import format_clock, format_duration
from rlhf_cli.running_tasks import listed, show_change
from rlhf_cli.verbosity import is_verbose

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


_NO_TEXT = BarText()


@dataclass(frozen=True)
class _Inside:
    """What is known of the units that are running; see `Task.within`."""

    units: float = 0.0
    text: BarText = _NO_TEXT
    unit_left: float | None = None
    left: float | None = None
    is_guess: bool = True


class Task:
    """Running work with a known number of units; created by `task`."""

    def __init__(
        self, label: str, total: int, unit: str, bar: Progress | None, done: int, share: int | None, *, saves: bool
    ) -> None:
        self.saves = saves
        self._label, self._total, self._unit, self._bar = label, total, unit, bar
        self._before, self._own, self._undone = done, 0, 0
        self._share = max(total - done if share is None else share, 1)
        self._began = self._spoke = self._moved = time.monotonic()
        self._between: float | None = None
        self._note, self._inside = "", _Inside()
        self._id: TaskID | None = None
        if bar is not None:
            self._id = bar.add_task(escape(label), total=total, completed=done, owner=self, **self._fields())

    @property
    def per_own(self) -> float:
        """What a unit of this process counts as: the other processes are taken to be as far as this one."""
        return (self._total - self._before) / self._share

    def _of_all(self, own: int) -> int:
        return (self._total - self._before) * own // self._share

    @property
    def _ran(self) -> int:
        return self._of_all(self._own)

    @property
    def _done(self) -> int:
        return self._before + self._of_all(self._own - self._undone)

    def advance(self, units: int = 1, note: str | None = None) -> None:
        """Count `units` of this process as done; `note` replaces what the bar says was measured, see `BarText`."""
        self._own += units
        self._note = self._note if note is None else note
        if units:
            self._inside = _Inside()
            self._move()
        self._show()

    def back(self, units: int) -> None:
        """Count `units` as not done: they run again. The time that they took still tells how long a unit takes."""
        self._undone += units
        self._inside = _Inside()
        self._show()

    def within(
        self,
        units: float,
        doing: str,
        *,
        amount: str = "",
        ended: int = 0,
        rate: str = "",
        unit_left: float | None = None,
        left: float | None = None,
        is_guess: bool | None = None,
    ) -> None:
        """Show how far the units are that are running.

        Args:
            units: how much of them is done, in units of this process, such as 0.25 of a step.
            doing: what is being done, in a few words.
            amount: how much of that is done.
            ended: units of this process to count as done, as `advance` does.
            rate: how fast.
            unit_left: seconds left of the unit that is running, if it is to be shown.
            left: seconds left of the whole task; None takes the time per unit so far, parts of units included.
            is_guess: whether the time left rests on more than what was measured; None where no unit is done.
        """
        self._own += ended
        text = BarText(doing, amount, rate=rate)
        is_guess = not self._ran if is_guess is None else is_guess
        self._inside = _Inside(units * self.per_own, text, unit_left, left, is_guess)
        self._move()
        self._show()

    def _move(self) -> None:
        """Remember when the work moved, and how long that took since it last did."""
        now = time.monotonic()
        self._between, self._moved = now - self._moved, now

    def _show(self) -> None:
        beat()
        show_change()
        now = time.monotonic()
        if self._bar is not None and self._id is not None:
            done = min(max(self._done + self._inside.units, 0), self._total)
            self._bar.update(self._id, completed=done, **self._fields())
        if now - self._spoke > _LINE_EVERY and self._done < self._total:
            self._spoke = now
            self.tell(self._line())

    def _line(self) -> str:
        """Return what a log says while the work goes on."""
        known = self._left()
        if known is None:
            left = f"{self.so_far} so far"
        else:
            left = f"{'~' if known[1] else 'about '}{format_duration(known[0])} left"
        doing = str(replace(self.text(), note=""))
        parts = [f"{self._done:,} of {_counted(self._total, self._unit)}", doing, left, self._note]
        return ", ".join(part for part in parts if part)

    def tell(self, text: str) -> None:
        """Print one line about the task, or log it where the bar shows it."""
        console.print(f"{self._label}: {text}", markup=False, shown=self._bar is None)

    @property
    def so_far(self) -> str:
        """Time since the task began."""
        return format_duration(time.monotonic() - self._began)

    def _fields(self) -> dict[str, Any]:
        """Return the texts of the bar that change with the work alone."""
        is_told = bool(self._inside.text.doing)
        return {"count": f"{self._done:,}/{self._total:,}", "rate": "" if is_told else self._rate()}

    def text(self) -> BarText:
        """Return the text at the end of the bar."""
        inside, ends = self._inside, ""
        if inside.unit_left is not None:
            left = max(inside.unit_left - (time.monotonic() - self._moved), 0.0)
            ends = f"{'~' if inside.is_guess else ''}{format_clock(left)} in {self._unit.removesuffix('s')}"
        return replace(inside.text, ends=ends, note=self._note)

    def _rate(self) -> str:
        """Return units per second, without units of an earlier attempt; "" where there are none."""
        if not self._ran:
            return ""
        rate = self._ran / max(self._moved - self._began, 1e-9)
        return f"{rate:,.1f} {self._unit}/s" if rate >= 0.1 else f"{1 / rate:,.0f} s each"

    def _left(self) -> tuple[float, bool] | None:
        """Return the seconds left and whether they are a guess; None without anything to go by."""
        inside, now = self._inside, time.monotonic()
        if inside.left is not None:
            return max(inside.left - (now - self._moved), 0.0), inside.is_guess
        each = self._seconds_each()
        if each is None:
            return None
        to_come = (self._total - self._done - inside.units) * each
        return max(to_come - (now - self._moved), 0.0), not self._ran

    def as_json(self) -> dict[str, Any]:
        """Return what the bar shows, for another process; `seconds_left` is null until it can be estimated."""
        known = self._left()
        return {
            "label": self._label,
            "done": self._done,
            "total": self._total,
            "unit": self._unit,
            "doing": str(self.text()),
            "seconds_left": None if known is None else round(known[0], 1),
            "is_guess": known is not None and known[1],
        }

    def until_saved(self) -> str:
        """Return after what a request to stop is honored, and when: the step, batch or token that is under way."""
        if self._unit != "steps":
            batch = f"the current {'token' if self._inside.text.doing else 'batch'} of {self._label}"
            if self._between is None:
                return f"{batch}, the first; how long it takes is not known yet"
            left = self._between - (time.monotonic() - self._moved)
            return f"{batch}, in about {format_duration(left)}" if left > 0 else f"{batch}, about to end"
        step = f"step {self._done + 1:,} of {self._total:,} of {self._label}"
        inside, each = self._inside, self._seconds_each()
        if each is None:
            return f"{step}, the first of this run; how long it takes is not known yet"
        left = each * (1 - inside.units) - (time.monotonic() - self._moved)
        if left <= 0:
            return f"{step}, which takes longer than those before it"
        return f"{step}, in {'about' if self._ran else 'very roughly'} {format_duration(left)}"

    def _seconds_each(self) -> float | None:
        """Return how long a unit takes; None without anything to go by."""
        inside, ran = self._inside, self._ran + self._inside.units
        if inside.left is not None:
            return inside.left / max(self._total - self._done - inside.units, 1e-9)
        return (self._moved - self._began) / ran if ran > 0 else None

    def time_text(self) -> str:
        """Return the time left; until that can be estimated, the time so far, which shows that work goes on."""
        so_far = format_clock(time.monotonic() - self._began)
        if self._done >= self._total:
            return so_far
        known = self._left()
        return f"{so_far} so far" if known is None else f"{'~' if known[1] else ''}{format_clock(known[0])} left"


def _counted(count: int, units: str) -> str:
    """Return a number with its unit, given in the plural."""
    return f"{count:,} {units.removesuffix('s') if count == 1 else units}"


_LINE_EVERY = 30.0
"""Seconds between two lines of a task in a log."""


@contextmanager
def task(
    label: str, total: int, unit: str = "steps", done: int = 0, *, saves: bool = True, share: int | None = None
) -> Iterator[Task]:
    """Show the progress of work.

    Args:
        label: what it is.
        total: number of units, of all processes.
        unit: their name, in the plural.
        done: units of an earlier attempt (a resumed stage).
        saves: whether the work looks for requests to stop, and saves what it has done; else Ctrl-C ends it at once.
        share: how many of the units to come this process does, where others do the rest; None is all.
    """
    with _shown(label, total, unit, done, saves=saves, share=share) as running, listed(running):
        yield running


@contextmanager
def _shown(label: str, total: int, unit: str, done: int, *, saves: bool, share: int | None) -> Iterator[Task]:
    with bar_of_tasks(console) if interactive() else contextlib.nullcontext() as bar:
        running = Task(label, total, unit, bar, done, share, saves=saves)
        running.tell(_counted(total - done, unit))
        yield running
        running.tell(f"done in {running.so_far}")


def say(text: str, *, always: bool = False) -> None:
    """Print one line on stderr.

    Args:
        text: the line.
        always: also print it under `--quiet`: the user waits for it, as for the address of a page.
    """
    console.print(text, markup=False, always=always)


@cache
def say_once(text: str) -> None:
    """Print one line on stderr, the first time in this process."""
    say(text)


@cache
def detail(text: str) -> None:
    """Log one line the first time in this process, and print it under `--verbose`: what most users need not know."""
    console.print(text, markup=False, shown=is_verbose())


def warn(text: str) -> None:
    """Print one warning on stderr."""
    console.print(f"[yellow]warning:[/yellow] {escape(text)}")
