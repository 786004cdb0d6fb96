"""Marks for each answer by each criterion: a small table that digits fill."""

from __future__ import annotations

from dataclasses import replace

from rlhf_cli.labeling.session.types import ANSWER_LETTERS, MARK_RANGE
from rlhf_cli.labeling.terminal.keys import Key
from rlhf_cli.labeling.terminal.state import Extent, State, hinted, unknown


def to_marks(state: State, extent: Extent) -> State:
    """The view of the marks, at the first that lacks."""
    return _at_cell(replace(state, view="marks"), state.empty_cell or state.cell, extent)


def in_marks(state: State, key: Key, letter: str, extent: Extent) -> State:
    """The state after a key in the view of the marks; Enter is for whoever calls."""
    if key.name == "escape":
        return replace(state, view="rank")
    if key.name in ("tab", "backtab"):
        return _at_cell(state, _beside(state, +1 if key.name == "tab" else -1), extent)
    if key.name in ("left", "right", "up", "down"):
        return _moved(state, key.name, extent)
    if key.name in ("backspace", "delete"):
        return _cleared(state, key.name == "backspace", extent)
    if letter.isdecimal() and letter.isascii():
        return marked_with(state, int(letter), extent)
    if letter and letter in ANSWER_LETTERS[: state.count]:
        return _at_cell(state, (ANSWER_LETTERS.index(letter), 0), extent)
    if letter == "=":
        return hinted(state, "Esc goes back to the ranking")
    return unknown(state, key)


def marked_with(state: State, mark: int, extent: Extent) -> State:
    """The state with a mark in its cell, at the next one."""
    low, high = MARK_RANGE
    if not low <= mark <= high:
        return hinted(state, f"marks go from {low} (worst) to {high} (best)")
    marked = _with_mark(state, mark)
    if marked.empty_cell is None:
        return hinted(marked, "all marks are there: Enter submits")
    return _at_cell(marked, _beside(state, +1), extent)


def _cleared(state: State, goes_back: bool, extent: Extent) -> State:
    answer, criterion = state.cell
    if state.marks[answer][criterion] is None and goes_back:
        state = _at_cell(state, _beside(state, -1), extent)
    return _with_mark(state, None)


def _with_mark(state: State, mark: int | None) -> State:
    answer, criterion = state.cell
    of_answer = state.marks[answer]
    of_answer = (*of_answer[:criterion], mark, *of_answer[criterion + 1 :])
    return replace(state, marks=(*state.marks[:answer], of_answer, *state.marks[answer + 1 :]))


def _beside(state: State, by: int) -> tuple[int, int]:
    """The next cell or the one before: all criteria of one answer, then those of the next; stops at the ends."""
    criteria = len(state.plan.criteria)
    number = state.cell[0] * criteria + state.cell[1] + by
    return divmod(max(0, min(number, state.count * criteria - 1)), criteria)


def _moved(state: State, to: str, extent: Extent) -> State:
    answer, criterion = state.cell
    answer += (to == "right") - (to == "left")
    criterion += (to == "down") - (to == "up")
    if 0 <= answer < state.count and 0 <= criterion < len(state.plan.criteria):
        return _at_cell(state, (answer, criterion), extent)
    return state


def _at_cell(state: State, cell: tuple[int, int], extent: Extent) -> State:
    """A cell, with its answer in sight."""
    if not extent.of_answer or cell[0] == state.cell[0]:
        return replace(state, cell=cell)
    return replace(state, cell=cell, top=min(extent.stops[extent.of_answer[cell[0]]], extent.last))
