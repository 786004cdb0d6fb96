"""Renders a state to a screen: rows of text, never wider or more than the screen."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_cli.labeling.session.progress import tasks_note
from rlhf_cli.labeling.session.types import COMPLETION_LETTERS
from rlhf_cli.labeling.terminal.guide import guide_rows
from rlhf_cli.labeling.terminal.layout import GUTTER, Document, document
from rlhf_cli.labeling.terminal.panels import ending_rows, footer, header, sampling_note
from rlhf_cli.labeling.terminal.state import ScrollArea, State
from rlhf_cli.labeling.terminal.wrapping import Piece, Row, cut, width_of, wrap

MIN_WIDTH, MIN_HEIGHT = 40, 12


@dataclass(frozen=True)
class Screen:
    """Rows from the top, and the cursor.

    Attributes:
        rows: exactly as many as the screen has.
        cursor: row and column; None if hidden.
    """

    rows: tuple[Row, ...]
    cursor: tuple[int, int] | None = None


def scroll_area(state: State, width: int, height: int) -> ScrollArea:
    """The scrollable area of the current view, for `step`."""
    if state.view == "help":
        return ScrollArea(max(1, height - 4), len(_guide(state, width)))
    laid_out = _laid_out(state, width, height)
    if laid_out is None:
        return ScrollArea(max(1, height), 0)
    return ScrollArea(_page(state, laid_out, width, height), len(laid_out.rows), laid_out.stops, laid_out.of_completion)


def draw(state: State, width: int, height: int) -> Screen:
    """Render the screen."""
    if width < MIN_WIDTH or height < MIN_HEIGHT:
        say = (f"at least {MIN_WIDTH} x {MIN_HEIGHT}", f"this is {width} x {height}", "q quits, all is kept")
        return _filled([(Piece(cut(text, width)),) for text in say], width, height)
    if state.view == "help":
        return _help(state, width, height)
    bottom, cursor = footer(state, width, _space(height))
    laid_out = _laid_out(state, width, height)
    if laid_out is None:
        rows = [header(state, width), _rule(width, right=sampling_note(state)), *ending_rows(state, width)]
        rows = rows[: height - len(bottom)]
        rows += [()] * (height - len(bottom) - len(rows))
    else:
        page = _page(state, laid_out, width, height)
        top = max(0, min(state.top, len(laid_out.rows) - page))
        rows = [header(state, width)]
        if laid_out.pinned:
            note = sampling_note(state)
            rows += [_rule(width, left="prompt", right=note), *((Piece(" "), *row) for row in laid_out.pinned)]
        rows.append(_top_rule(laid_out, top, width, "" if laid_out.pinned else sampling_note(state)))
        rows += _body(state, laid_out, top, page)
        below = len(laid_out.rows) - top - page
        rows.append(_rule(width, right=f"▼ {_lines(below, 'more ')}" if below > 0 else ""))
    first = len(rows)
    shown = _filled([*rows, *bottom], width, height)
    return Screen(shown.rows, None if cursor is None else (first + cursor[0], cursor[1]))


def _laid_out(state: State, width: int, height: int) -> Document | None:
    """The document of the task; None without a task, or if the screen is too small."""
    if state.task is None or width < MIN_WIDTH or height < MIN_HEIGHT:
        return None
    return document(state.task.prompt, state.task.completions, state.task.endings, width, _pinnable(height))


def _pinnable(height: int) -> int:
    """Maximum height of a pinned prompt; 0 if the completions need all rows."""
    return height // 6 if height >= 20 else 0


def _space(height: int) -> int:
    """Maximum height of the footer, after header, rules, prompt and one row of a completion."""
    return height - 4 - (_pinnable(height) + 1 if _pinnable(height) else 0)


def _page(state: State, laid_out: Document, width: int, height: int) -> int:
    bottom, _ = footer(state, width, _space(height))
    pinned = len(laid_out.pinned) + 1 if laid_out.pinned else 0
    return max(1, height - 3 - pinned - len(bottom))


def _body(state: State, laid_out: Document, top: int, page: int) -> list[Row]:
    positions = _positions(state)
    rows: list[Row] = []
    for number, cells in enumerate(laid_out.rows[top : top + page], start=top):
        row: list[Piece] = []
        for cell in cells:
            if cell.completion is not None:
                row += _gutter(cell.completion, cell.line, cell.at - GUTTER, positions)
            row += [Piece(piece.text, piece.style, cell.at if n == 0 else None) for n, piece in enumerate(cell.pieces)]
        if number >= laid_out.stops[0]:
            row += [Piece("│", "dim", column) for column in laid_out.separators]
        rows.append(_in_order(row))
    return rows + [()] * (page - len(rows))


def _in_order(row: list[Piece]) -> Row:
    """Sort pieces from left to right; pieces without a column stay behind the one they follow."""
    at, keyed = 0, []
    for number, piece in enumerate(row):
        at = piece.at if piece.at is not None else at
        keyed.append((at, number, piece))
    return tuple(piece for _, _, piece in sorted(keyed, key=lambda entry: entry[:2]))


def _gutter(completion: int, line: int, at: int, positions: dict[int, str]) -> list[Piece]:
    if line == 0:
        return [Piece(f" {COMPLETION_LETTERS[completion]} ", "tag", at + 1)]
    if line == 1 and completion in positions:
        return [Piece(positions[completion].rjust(GUTTER - 1), "good", at)]
    return []


def _positions(state: State) -> dict[int, str]:
    """Completion -> its place: 1st, or =2nd for a tie."""
    positions, number = {}, 1
    for tier in state.tiers:
        ending = "th" if 10 < number % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
        for completion in tier:
            positions[completion] = f"{'=' if len(tier) > 1 else ''}{number}{ending}"
        number += len(tier)
    return positions


def _top_rule(laid_out: Document, top: int, width: int, note: str) -> Row:
    """Rule that says how much is above, and which completions continue in the first row; at the top, a note."""
    if top == 0:
        return _rule(width, left="" if laid_out.pinned else "prompt", right=note)
    going_on = [cell.completion for cell in laid_out.rows[top] if cell.completion is not None and cell.line > 0]
    names = ", ".join(COMPLETION_LETTERS[completion] for completion in going_on)
    return _rule(width, left=f"{names}, continued" if names else "", right=f"▲ {_lines(top)} above")


def _lines(count: int, which: str = "") -> str:
    return f"{count:,} {which}line" if count == 1 else f"{count:,} {which}lines"


def _rule(width: int, left: str = "", right: str = "") -> Row:
    start = f"── {cut(left, width // 2)} " if left else ""
    end = f" {cut(right, width // 2 - 8)} ──" if right else ""
    middle = "─" * max(0, width - len(start) - len(end))
    if not right:
        return (Piece(start + middle, "dim"),)
    return (Piece(start + middle + " ", "dim"), Piece(end[1:-3], "accent"), Piece(" ──", "dim"))


def _guide(state: State, width: int) -> list[Row]:
    """What the tasks are, guidelines and keys."""
    note = tasks_note(state.progress, state.plan)
    return [*(wrap(f"{note}.", width - 2) if note else ()), *(((),) if note else ()), *guide_rows(state.plan, width)]


def _help(state: State, width: int, height: int) -> Screen:
    guide = _guide(state, width)
    page = max(1, height - 4)
    top = max(0, min(state.help_top, len(guide) - page))
    below = len(guide) - top - page
    shown = [((Piece(" "), *row)) for row in guide[top : top + page]]
    shown += [()] * (page - len(shown))
    rows = [
        header(state, width),
        _rule(
            width,
            left="guidelines and keys" if state.plan.guidelines else "keys",
            right=f"▲ {_lines(top)} above" if top else "",
        ),
        *shown,
        _rule(width, right=f"▼ {_lines(below, 'more ')}" if below > 0 else ""),
        (Piece(cut(" " + (state.hint or "Enter continues with the answers"), width), "bold"),),
    ]
    return _filled(rows, width, height)


def _filled(rows: list[Row], width: int, height: int) -> Screen:
    """Fill the screen; last defense against rows that are too wide."""
    rows = rows[:height] + [()] * (height - len(rows))
    return Screen(tuple(_clipped(row, width) for row in rows))


def _clipped(row: Row, width: int) -> Row:
    at, kept = 0, []
    for piece in row:
        at = piece.at if piece.at is not None else at
        size = width_of(piece.text)
        if at + size > width:
            if at < width:
                kept.append(Piece(cut(piece.text, width - at), piece.style, piece.at))
            break
        kept.append(piece)
        at += size
    return tuple(kept)
