"""All that the screen of a labeling session shows, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from rlhf_cli.labeling.session.types import MARK_RANGE, Entry, LabelPlan, Progress, Task
from rlhf_cli.labeling.terminal.editing import Line
from rlhf_cli.labeling.terminal.keys import Key
from rlhf_cli.labeling.terminal.visible import in_one_line

View = Literal["rank", "marks", "note", "flag", "help", "end", "trouble"]
Tiers = tuple[tuple[int, ...], ...]
_NO_PROGRESS = Progress(0, 0, 0, 0, 0, False)


@dataclass(frozen=True)
class Effect:
    """Something for the session, or the terminal, to do.

    Attributes:
        kind: `leave` is `quit` without trying to save the draft once more; `next` asks for a task.
        entry: for `submit`.
        reason: for `flag`.
    """

    kind: Literal["submit", "skip", "flag", "undo", "next", "quit", "leave", "suspend", "redraw"]
    entry: Entry = field(default_factory=Entry)
    reason: str = ""


@dataclass(frozen=True)
class Trouble:
    """Something that could not be done; it can be tried again."""

    message: str
    hint: str
    effect: Effect


@dataclass(frozen=True)
class Extent:
    """How much there is to scroll through, and how much of it is seen at once.

    Attributes:
        page: rows seen.
        total: rows there are.
        stops: row where each answer begins (in columns: each row of answers).
        of_answer: answer -> its index in `stops`.
    """

    page: int
    total: int
    stops: tuple[int, ...] = (0,)
    of_answer: tuple[int, ...] = ()

    @property
    def last(self) -> int:
        """The highest row that can stand at the top."""
        return max(0, self.total - self.page)


@dataclass(frozen=True)
class State:
    """All that the screen shows.

    Attributes:
        plan: what is asked for beside the ranking.
        name: the annotator's.
        progress: theirs.
        task: in hand; None when nothing is left, or it could not be read.
        view: what the keys mean now.
        tiers: shown positions, best first, within a tier in the order pressed.
        is_joining: `=` was pressed and waits for its letter.
        strength: 1 to 4.
        marks: answer -> criterion -> mark.
        note: free text.
        cell: answer and criterion of the mark that a digit sets.
        line: what is being typed, in `note` and `flag`.
        top: first row of the answers that is seen.
        help_top: the same of the help.
        before: the view that help or trouble returns to.
        hint: one line about what happened or lacks; gone with the next key.
        hint_style: how loud.
        trouble: in `trouble`.
    """

    plan: LabelPlan
    name: str = ""
    progress: Progress = _NO_PROGRESS
    task: Task | None = None
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
    trouble: Trouble | None = None

    @property
    def count(self) -> int:
        """Answers of the task."""
        return 0 if self.task is None else len(self.task.answers)

    @property
    def unplaced(self) -> tuple[int, ...]:
        """Answers without a place, in the order shown."""
        placed = {position for tier in self.tiers for position in tier}
        return tuple(position for position in range(self.count) if position not in placed)

    @property
    def asks_strength(self) -> bool:
        """Whether the ranking as it is needs a strength."""
        return self.plan.strengths and self.count == 2 and len(self.tiers) == 2

    @property
    def empty_cell(self) -> tuple[int, int] | None:
        """First mark that lacks, answer by answer; None if none does."""
        for answer, marks in enumerate(self.marks):
            for criterion, mark in enumerate(marks):
                if mark is None:
                    return answer, criterion
        return None

    @property
    def entry(self) -> Entry:
        """What was entered so far, as the session takes it."""
        criteria = self.plan.criteria
        has_marks = any(mark is not None for marks in self.marks for mark in marks)
        note = self.line.text if self.view == "note" else self.note
        return Entry(
            tuple(tuple(sorted(tier)) for tier in self.tiers),
            self.strength,
            {name: tuple(marks[at] for marks in self.marks) for at, name in enumerate(criteria)} if has_marks else {},
            note,
        )


def with_task(state: State, task: Task | None, hint: str = "", style: Literal["dim", "warn", "good"] = "dim") -> State:
    """The state at the beginning of a task, with its draft; `end` where there is none."""
    draft = task.draft if task is not None and task.draft is not None else Entry()
    count = 0 if task is None else len(task.answers)
    marks = _table(draft.marks, state.plan, count)
    fresh = State(
        state.plan, state.name, state.progress, task,
        tiers=draft.tiers, strength=draft.strength, marks=marks, note=draft.note,
        view="rank" if task is not None else "end", hint=hint, hint_style=style,
    )  # fmt: skip
    return fresh if fresh.asks_strength else replace(fresh, strength=None)


def with_plan(state: State, plan: LabelPlan) -> State:
    """The state where something else is asked now: what was entered stays as far as it is still asked for."""
    changed = replace(state, plan=plan, marks=_table(state.entry.marks, plan, state.count), cell=(0, 0))
    if changed.view == "marks":
        changed = replace(changed, view="rank")
    if changed.before == "marks":
        changed = replace(changed, before="rank")
    return changed if changed.asks_strength else replace(changed, strength=None)


def _table(
    given: Mapping[str, tuple[int | None, ...]], plan: LabelPlan, count: int
) -> tuple[tuple[int | None, ...], ...]:
    """Marks by answer and criterion; what is none of this plan's marks is left out."""
    low, high = MARK_RANGE
    by_name = [given.get(name, ()) for name in plan.criteria]
    return tuple(
        tuple(
            mark if answer < len(marks) and (mark := marks[answer]) is not None and low <= mark <= high else None
            for marks in by_name
        )
        for answer in range(count)
    )


def with_trouble(state: State, trouble: Trouble) -> State:
    """The state that shows what could not be done."""
    before = state.before if state.view in ("trouble", "help") else state.view
    return replace(state, view="trouble", before=before, trouble=trouble, hint="")


def hinted(state: State, hint: str) -> State:
    """The state with a quiet hint."""
    return replace(state, hint=hint, hint_style="dim")


def warned(state: State, hint: str) -> State:
    """The state with a hint that is not to be overlooked."""
    return replace(state, hint=hint, hint_style="warn")


def unknown(state: State, key: Key) -> State:
    """The state after a key that means nothing."""
    if key.name == "paste":
        return hinted(state, "pasted text is no ranking: nothing was entered")
    what = in_one_line(key.text) if key.name == "text" else "that key"
    return hinted(state, f"{what} does nothing here; ? shows the keys")
