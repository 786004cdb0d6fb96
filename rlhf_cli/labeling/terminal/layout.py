"""Prompt and answers as rows: answers one below the other, or side by side where each has room."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from rlhf_cli.data.records import Prompt
from rlhf_cli.labeling.terminal.wrapping import Piece, Row, cut, wrap

GUTTER = 6
"""Columns on the left of an answer, for its letter and its place."""
MIN_COLUMN = 40
MIN_SIDE_BY_SIDE = 100
_MAX_TEXT = 110
"""Cells of a line that eyes can still follow back."""
_BETWEEN = 3


class Cell(NamedTuple):
    """One row of one answer, or of the prompt.

    Attributes:
        at: column where it begins.
        pieces: text.
        answer: whose; None for the prompt.
        line: of the answer's rows, 0 the first.
    """

    at: int
    pieces: Row
    answer: int | None = None
    line: int = 0


@dataclass(frozen=True)
class Document:
    """All there is to read of one task.

    Attributes:
        pinned: rows of the prompt that stay in sight; none where it is too long for that.
        rows: what scrolls.
        stops: row where each group of answers begins.
        of_answer: answer -> its index in `stops`.
        columns: answers side by side.
        separators: columns of the lines between answers.
    """

    pinned: tuple[Row, ...]
    rows: tuple[tuple[Cell, ...], ...]
    stops: tuple[int, ...]
    of_answer: tuple[int, ...]
    columns: int
    separators: tuple[int, ...]


def columns_for(count: int, width: int) -> int:
    """How many answers stand side by side; as even rows of them as possible."""
    if width < MIN_SIDE_BY_SIDE:
        return 1
    fit = max(1, min(count, (width + _BETWEEN - 1) // (MIN_COLUMN + _BETWEEN)))
    groups = -(-count // fit)
    return -(-count // groups)


@lru_cache(maxsize=4)
def document(prompt: Prompt, answers: tuple[str, ...], width: int, pinnable: int) -> Document:
    """Lay a task out.

    Args:
        prompt: what was asked.
        answers: in shown order.
        width: of the screen.
        pinnable: rows that a prompt may have and still stay in sight.
    """
    asked = _prompt_rows(prompt, min(width - 2, _MAX_TEXT))
    is_pinned = len(asked) <= pinnable
    rows: list[tuple[Cell, ...]] = []
    if not is_pinned:
        rows = [(Cell(1, pieces),) for pieces in asked] + [()]
    columns = columns_for(len(answers), width)
    share = (width - 1 - (columns - 1) * _BETWEEN) // columns
    stops, of_answer = [], []
    for first in range(0, len(answers), columns):
        stops.append(len(rows))
        group = range(first, min(first + columns, len(answers)))
        of_answer += [len(stops) - 1] * len(group)
        blocks = [_answer_cells(answers[n], n, (n - first) * (share + _BETWEEN), share) for n in group]
        tallest = max(len(block) for block in blocks)
        rows += [tuple(block[line] for block in blocks if line < len(block)) for line in range(tallest)]
        rows.append(())
    if rows and not rows[-1]:
        rows.pop()
    separators = tuple((n + 1) * (share + _BETWEEN) - 2 for n in range(columns - 1))
    return Document(asked if is_pinned else (), tuple(rows), tuple(stops), tuple(of_answer), columns, separators)


def _answer_cells(text: str, answer: int, at: int, share: int) -> list[Cell]:
    rows = wrap(text, min(share - GUTTER, _MAX_TEXT))
    if not text.strip():
        rows = ((Piece("(only white space)" if text else "(an empty answer)", "dim"),), *rows[1:])
    if len(rows) == 1:
        rows = (*rows, ())  # room for the place
    return [Cell(at + GUTTER, pieces, answer, line) for line, pieces in enumerate(rows)]


def _prompt_rows(prompt: Prompt, width: int) -> tuple[Row, ...]:
    if isinstance(prompt, str):
        return wrap(prompt, width, "bold") if prompt.strip() else ((Piece("(an empty prompt)", "dim"),),)
    if len(prompt) == 1 and prompt[0].role == "user":
        return wrap(prompt[0].content, width, "bold")
    rows: list[Row] = []
    for turn in prompt:
        rows.append((Piece(cut(turn.role, width - 1) + ":", "accent"),))
        rows += [(Piece("  "), *pieces) for pieces in wrap(turn.content, width - 2)]
    return tuple(rows)
