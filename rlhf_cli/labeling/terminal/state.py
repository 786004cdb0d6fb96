"""The state of the screen, as an immutable value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.types import MARK_RANGE, Entry, LabelTask, SessionProgress
from rlhf_cli.labeling.terminal.editing import Line
from rlhf_cli.labeling.terminal.keys import Key
from rlhf_cli.labeling.terminal.visible import in_one_line

View = Literal["rank", "marks", "note", "flag", "help", "end", "failure"]
Tiers = tuple[tuple[int, ...], ...]
_NO_PROGRESS = SessionProgress(0, 0, 0, 0, 0, False)


@dataclass(frozen=True)
class Effect:
    """An action for the session or the terminal.

    Attributes:
        kind: `leave` is `quit` without saving the draft again; `next` loads a task.
        entry: for `submit`.
        reason: for `flag`.
    """

    kind: Literal["submit", "skip", "flag", "undo", "next", "quit", "leave", "suspend", "redraw"]
    entry: Entry = field(default_factory=Entry)
    reason: str = ""


@dataclass(frozen=True)
class Failure:
    """An error of an effect, which can be retried."""

    message: str
    hint: str
    effect: Effect


@dataclass(frozen=True)
class ScrollArea:
    """Size of the scrollable content and of the visible part.

    Attributes:
        page: visible rows.
        total: number of rows.
        stops: first row of each completion (side by side: of each group of completions).
        of_completion: completion -> its index in `stops`.
    """

    page: int
    total: int
    stops: tuple[int, ...] = (0,)
    of_completion: tuple[int, ...] = ()

    @property
    def last(self) -> int:
        """The largest possible first row."""
        return max(0, self.total - self.page)


@dataclass(frozen=True)
class State:
    """Everything the screen shows.

    Attributes:
        plan: how to label.
        name: of the annotator.
        progress: of the annotator.
        task: current task; None if nothing is left, or it could not be loaded.
        view: determines what keys mean.
        tiers: shown positions, best first; within a tier in the order typed.
        is_joining: `=` was typed and its letter is missing.
        strength: 1 to 4.
        marks: completion -> criterion -> mark.
        note: free text.
        cell: completion and criterion of the mark that a digit sets.
        line: text being typed, in `note` and `flag`.
        top: first visible row.
        help_top: first visible row of the help.
        before: view to return to from `help` and `failure`.
        hint: one line about what happened or is missing; cleared by the next key.
        hint_style: style of the hint.
        failure: shown in the view `failure`.
        is_sampling: whether completions are being sampled, if the progress says that some are to come.
    """

    plan: LabelPlan
    name: str = ""
    progress: SessionProgress = _NO_PROGRESS
    task: LabelTask | None = None
    view: View = "rank"
    tiers: Tiers = ()
    is_joining: bool = False
    strength: int | None = None
    marks: tuple[tuple[int | None, ...], ...] = ()
    note: str = ""
    cell: tuple[int, int] = (0, 0)
    line: Line = field(default_factory=Line)
    top: int = 0
    help_top: int = 0
    before: View = "rank"
    hint: str = ""
    hint_style: Literal["dim", "warn", "good"] = "dim"
    failure: Failure | None = None
    is_sampling: bool = False

    @property
    def is_waiting(self) -> bool:
        """Whether there is no task now, and a new one appears by itself."""
        return self.task is None and self.progress.growth is not None and self.is_sampling

    @property
    def count(self) -> int:
        """Number of completions of the task."""
        return 0 if self.task is None else len(self.task.completions)

    @property
    def unplaced(self) -> tuple[int, ...]:
        """Unranked completions, in the order shown."""
        placed = {position for tier in self.tiers for position in tier}
        return tuple(position for position in range(self.count) if position not in placed)

    @property
    def asks_strength(self) -> bool:
        """Whether the current ranking needs a strength."""
        return self.plan.strengths and self.count == 2 and len(self.tiers) == 2

    @property
    def empty_cell(self) -> tuple[int, int] | None:
        """First missing mark; None if all are set."""
        for completion, marks in enumerate(self.marks):
            for criterion, mark in enumerate(marks):
                if mark is None:
                    return completion, criterion
        return None

    @property
    def entry(self) -> Entry:
        """The entry so far, for the session."""
        criteria = self.plan.criteria
        has_marks = any(mark is not None for marks in self.marks for mark in marks)
        note = self.line.text if self.view == "note" else self.note
        return Entry(
            tuple(tuple(sorted(tier)) for tier in self.tiers),
            self.strength,
            {name: tuple(marks[at] for marks in self.marks) for at, name in enumerate(criteria)} if has_marks else {},
            note,
        )


def with_task(
    state: State, task: LabelTask | None, hint: str = "", style: Literal["dim", "warn", "good"] = "dim"
) -> State:
    """The state at the beginning of a task, with its draft; view `end` without a task."""
    draft = task.draft if task is not None and task.draft is not None else Entry()
    count = 0 if task is None else len(task.completions)
    marks = _table(draft.marks, state.plan, count)
    fresh = State(
        state.plan, state.name, state.progress, task,
        tiers=draft.tiers, strength=draft.strength, marks=marks, note=draft.note,
        view="rank" if task is not None else "end", hint=hint, hint_style=style, is_sampling=state.is_sampling,
    )  # fmt: skip
    return fresh if fresh.asks_strength else replace(fresh, strength=None)


def with_plan(state: State, plan: LabelPlan) -> State:
    """The state under a new plan: the entry is kept as far as the plan allows."""
    changed = replace(state, plan=plan, marks=_table(state.entry.marks, plan, state.count), cell=(0, 0))
    if changed.view == "marks":
        changed = replace(changed, view="rank")
    if changed.before == "marks":
        changed = replace(changed, before="rank")
    return changed if changed.asks_strength else replace(changed, strength=None)


def _table(
    given: Mapping[str, tuple[int | None, ...]], plan: LabelPlan, count: int
) -> tuple[tuple[int | None, ...], ...]:
    """Marks by completion and criterion; marks that the plan does not ask for are dropped."""
    low, high = MARK_RANGE
    by_name = [given.get(name, ()) for name in plan.criteria]
    return tuple(
        tuple(
            mark if n < len(marks) and (mark := marks[n]) is not None and low <= mark <= high else None
            for marks in by_name
        )
        for n in range(count)
    )


def with_failure(state: State, failure: Failure) -> State:
    """Show an error."""
    before = state.before if state.view in ("failure", "help") else state.view
    return replace(state, view="failure", before=before, failure=failure, hint="")


def hinted(state: State, hint: str) -> State:
    """Show a hint."""
    return replace(state, hint=hint, hint_style="dim")


def warned(state: State, hint: str) -> State:
    """Show a prominent hint."""
    return replace(state, hint=hint, hint_style="warn")


def unknown(state: State, key: Key) -> State:
    """Report a key without a meaning."""
    if key.name == "paste":
        return hinted(state, "pasted text was ignored: type the ranking")
    what = in_one_line(key.text) if key.name == "text" else "that key"
    return hinted(state, f"{what} does nothing here; ? shows the keys")
