"""Look-ups and checks that a labeling session makes before it changes anything."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_cli.labeling.session.rows import Assignment, Kind
from rlhf_cli.labeling.session.state import LabelState
from rlhf_cli.labeling.session.types import (
    Entry,
    InvalidLabelError,
    LabelConflictError,
    LabelTask,
    Receipt,
    UnknownTaskError,
)

_MAX_KEY = 100


def task_of(state: LabelState, number: int) -> LabelTask:
    """The task of an assignment, as its annotator sees it."""
    given = state.assignments[number]
    item = state.items[given.item]
    entry, active_ms = state.draft(number)
    return LabelTask(
        id=number,
        number=state.of_annotator[given.annotator].index(number) + 1,
        prompt=item.prompt,
        completions=tuple(item.completions[index] for index in given.shown),
        plan=state.plan.display_hash,
        draft=entry,
        active_seconds=active_ms / 1000,
        endings=_endings(state.cut_off.get(given.item), given.shown),
    )


def _endings(tokens: Sequence[int | None] | None, shown: Sequence[int]) -> tuple[str, ...]:
    """Say which completions were cut off, by shown position.

    Different limits are not said: they would tell apart the sources of the completions.
    """
    if tokens is None:
        return ("",) * len(shown)
    limits = {one for one in tokens if one is not None}
    said = "cut off at the token limit"
    if len(limits) == 1:
        limit = limits.pop()
        said = f"cut off at the limit of {limit:,} {'token' if limit == 1 else 'tokens'}"
    return tuple("" if tokens[index] is None else said for index in shown)


def own_assignment(state: LabelState, annotator: int, task: int) -> Assignment:
    """An assignment of this annotator; raises `UnknownTaskError` for any other."""
    given = state.assignments.get(task)
    if given is None or given.annotator != annotator:
        raise UnknownTaskError(f"task {task} is not one of yours", hint="load the next task")
    return given


def receipt_of_same(
    state: LabelState, given: Assignment, kind: Kind, entry: Entry | None, reason: str, key: str
) -> Receipt | None:
    """Receipt of an equal label that is stored already; raises `LabelConflictError` for a different one."""
    standing = state.standing.get(given.id)
    used = state.by_key.get(scoped_key(given.annotator, key))
    if used is not None and used is not standing:
        what = "this label was undone" if used.assignment == given.id else "this key was used before"
        raise LabelConflictError(what, hint="submit it as a new label, with a new key")
    if standing is None:
        return None
    if (standing.kind, standing.entry, standing.reason) != (kind, entry, reason):
        raise LabelConflictError("this task has another label already", hint="undo the earlier label first")
    return Receipt(standing.id, given.id, is_new=False)


def scoped_key(annotator: int, key: str) -> str:
    """A client's key, unique among all annotators."""
    if not key or len(key) > _MAX_KEY or not key.isascii() or not key.isprintable():
        raise InvalidLabelError("invalid key", hint=f"use 1 to {_MAX_KEY} printable ASCII characters")
    return f"{annotator}:{key}"


def checked_active_ms(given: Assignment, seconds: float, now_ms: int) -> int:
    """Active time in milliseconds, at most the time since the task was assigned; raises `InvalidLabelError`."""
    if not seconds >= 0.0:
        raise InvalidLabelError(f"active time must be at least 0 s; got {seconds} s", hint="give seconds")
    milliseconds, passed = round(min(seconds, 1e9) * 1000), now_ms - given.at
    return min(milliseconds, passed) if passed >= 0 else milliseconds  # the clock was set back: no upper bound
