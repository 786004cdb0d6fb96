"""Key bindings of the marks view: a table of completions and criteria that digits fill."""

from __future__ import annotations

from dataclasses import replace

from rlhf_cli.labeling.session.types import COMPLETION_LETTERS, MARK_RANGE
from rlhf_cli.labeling.terminal.keys import Key
from rlhf_cli.labeling.terminal.state import ScrollArea, State, hinted, unknown


def to_marks(state: State, scroll_area: ScrollArea) -> State:
    """Open the marks view at the first missing mark."""
    return _at_cell(replace(state, view="marks"), state.empty_cell or state.cell, scroll_area)


def in_marks(state: State, key: Key, letter: str, scroll_area: ScrollArea) -> State:
    """Handle a key in the marks view; the caller handles Enter."""
    if key.name == "escape":
        return replace(state, view="rank")
    if key.name in ("tab", "backtab"):
        return _at_cell(state, _beside(state, +1 if key.name == "tab" else -1), scroll_area)
    if key.name in ("left", "right", "up", "down"):
        return _moved(state, key.name, scroll_area)
    if key.name in ("backspace", "delete"):
        return _cleared(state, key.name == "backspace", scroll_area)
    if letter.isdecimal() and letter.isascii():
        return marked_with(state, int(letter), scroll_area)
    if letter and letter in COMPLETION_LETTERS[: state.count]:
        return _at_cell(state, (COMPLETION_LETTERS.index(letter), 0), scroll_area)
    if letter == "=":
        return hinted(state, "Esc goes back to the ranking")
    return unknown(state, key)


def marked_with(state: State, mark: int, scroll_area: ScrollArea) -> State:
    """Set the mark of the current cell and go to the next one."""
    low, high = MARK_RANGE
    if not low <= mark <= high:
        return hinted(state, f"marks go from {low} (worst) to {high} (best)")
    marked = _with_mark(state, mark)
    if marked.empty_cell is None:
        return hinted(marked, "all marks are set: Enter submits")
    return _at_cell(marked, _beside(state, +1), scroll_area)


def _cleared(state: State, goes_back: bool, scroll_area: ScrollArea) -> State:
    completion, criterion = state.cell
    if state.marks[completion][criterion] is None and goes_back:
        state = _at_cell(state, _beside(state, -1), scroll_area)
    return _with_mark(state, None)


def _with_mark(state: State, mark: int | None) -> State:
    completion, criterion = state.cell
    of_completion = state.marks[completion]
    of_completion = (*of_completion[:criterion], mark, *of_completion[criterion + 1 :])
    return replace(state, marks=(*state.marks[:completion], of_completion, *state.marks[completion + 1 :]))


def _beside(state: State, by: int) -> tuple[int, int]:
    """The next or previous cell: all criteria of one completion, then those of the next; stops at the ends."""
    criteria = len(state.plan.criteria)
    number = state.cell[0] * criteria + state.cell[1] + by
    return divmod(max(0, min(number, state.count * criteria - 1)), criteria)


def _moved(state: State, to: str, scroll_area: ScrollArea) -> State:
    completion, criterion = state.cell
    completion += (to == "right") - (to == "left")
    criterion += (to == "down") - (to == "up")
    if 0 <= completion < state.count and 0 <= criterion < len(state.plan.criteria):
        return _at_cell(state, (completion, criterion), scroll_area)
    return state


def _at_cell(state: State, cell: tuple[int, int], scroll_area: ScrollArea) -> State:
    """Go to a cell and scroll its completion into view."""
    if not scroll_area.of_completion or cell[0] == state.cell[0]:
        return replace(state, cell=cell)
    return replace(state, cell=cell, top=min(scroll_area.stops[scroll_area.of_completion[cell[0]]], scroll_area.last))
