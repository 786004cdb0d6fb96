"""Lays out prompt and completions as rows: one below the other, or side by side if there is room."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from rlhf_cli.data.records import Prompt
from rlhf_cli.labeling.terminal.wrapping import Piece, Row, cut, wrap

GUTTER = 6
"""Columns on the left of a completion, for its letter and place."""
MIN_COLUMN = 40
MIN_SIDE_BY_SIDE = 100
_MAX_TEXT = 110
"""Maximum line length for comfortable reading, in cells."""
_BETWEEN = 3


class Cell(NamedTuple):
    """One row of a completion or of the prompt.

    Attributes:
        at: first column.
        pieces: text.
        completion: position; None for the prompt.
        line: row within the completion, from 0.
    """

    at: int
    pieces: Row
    completion: int | None = None
    line: int = 0


@dataclass(frozen=True)
class Document:
    """The complete text of a task.

    Attributes:
        pinned: rows of the prompt that stay visible; none if the prompt is too long.
        rows: scrollable rows.
        stops: first row of each group of completions.
        of_completion: completion -> its index in `stops`.
        columns: number of completions side by side.
        separators: columns of the lines between completions.
    """

    pinned: tuple[Row, ...]
    rows: tuple[tuple[Cell, ...], ...]
    stops: tuple[int, ...]
    of_completion: tuple[int, ...]
    columns: int
    separators: tuple[int, ...]


def columns_for(count: int, width: int) -> int:
    """Number of completions side by side, in groups as even as possible."""
    if width < MIN_SIDE_BY_SIDE:
        return 1
    fit = max(1, min(count, (width + _BETWEEN - 1) // (MIN_COLUMN + _BETWEEN)))
    groups = -(-count // fit)
    return -(-count // groups)


@lru_cache(maxsize=4)
def document(
    prompt: Prompt, completions: tuple[str, ...], endings: tuple[str, ...], width: int, pinnable: int
) -> Document:
    """Lay out a task.

    Args:
        prompt: text or messages.
        completions: in shown order.
        endings: see `LabelTask`; none if they are not known.
        width: of the screen.
        pinnable: maximum height of a pinned prompt.
    """
    asked = _prompt_rows(prompt, min(width - 2, _MAX_TEXT))
    is_pinned = len(asked) <= pinnable
    rows: list[tuple[Cell, ...]] = []
    if not is_pinned:
        rows = [(Cell(1, pieces),) for pieces in asked] + [()]
    columns = columns_for(len(completions), width)
    share = (width - 1 - (columns - 1) * _BETWEEN) // columns
    endings = endings or ("",) * len(completions)
    stops, of_completion = [], []
    for first in range(0, len(completions), columns):
        stops.append(len(rows))
        group = range(first, min(first + columns, len(completions)))
        of_completion += [len(stops) - 1] * len(group)
        blocks = [
            _completion_cells(completions[n], endings[n], n, (n - first) * (share + _BETWEEN), share) for n in group
        ]
        tallest = max(len(block) for block in blocks)
        rows += [tuple(block[line] for block in blocks if line < len(block)) for line in range(tallest)]
        rows.append(())
    if rows and not rows[-1]:
        rows.pop()
    separators = tuple((n + 1) * (share + _BETWEEN) - 2 for n in range(columns - 1))
    return Document(asked if is_pinned else (), tuple(rows), tuple(stops), tuple(of_completion), columns, separators)


def _completion_cells(text: str, ending: str, completion: int, at: int, share: int) -> list[Cell]:
    space = min(share - GUTTER, _MAX_TEXT)
    rows = wrap(text, space)
    if not text.strip():
        rows = ((Piece("(only white space)" if text else "(an empty answer)", "dim"),), *rows[1:])
    if ending:  # above the text, the end of which may be off the screen
        rows = (*wrap(f"({ending})", space, "warn"), *rows)
    if len(rows) == 1:
        rows = (*rows, ())  # a second row for the place
    return [Cell(at + GUTTER, pieces, completion, line) for line, pieces in enumerate(rows)]


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
