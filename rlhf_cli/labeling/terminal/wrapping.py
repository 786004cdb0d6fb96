"""Wraps text into rows of a given width: keeps words, line breaks and indentation; wide characters count two."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from rlhf_cli.labeling.terminal.visible import Cluster, clusters, in_one_line, lines_of

Style = Literal["plain", "dim", "bold", "tag", "good", "accent", "mark", "warn", "error", "chosen"]

_HANGING = 4
"""Extra indentation of continuation rows of an indented line (code, a list)."""
_RUNS = re.compile(r" +|[^ ]+")
_PLAIN = re.compile(r"[!-~]+")
_NEVER_FIRST = (
    ",.!?:;)]}\u2019\u201d\u2026"
    "\u3001\u3002\u3005\u3009\u300b\u300d\u300f\u3011\u301c\u30fc"  # ideographic stops and closing brackets
    "\uff01\uff09\uff0c\uff0e\uff1a\uff1b\uff1f"  # the fullwidth forms
)
"""Punctuation that must not begin a row."""


class Piece(NamedTuple):
    """Text in one style.

    Attributes:
        text: visible text only, as made by `visible`.
        style: how to display it.
        at: column, 0 is the first; None: directly after the preceding piece.
    """

    text: str
    style: Style = "plain"
    at: int | None = None


Row = tuple[Piece, ...]


@dataclass(frozen=True)
class _Token:
    """A unit that is broken only if it is longer than a row."""

    parts: tuple[Cluster, ...]
    width: int

    @property
    def is_blank(self) -> bool:
        return self.parts[0].text == " " and not self.parts[0].is_mark


@lru_cache(maxsize=512)
def wrap(text: str, width: int, style: Style = "plain") -> tuple[Row, ...]:
    """Wrap untrusted text into rows of at most `width` cells (8 or more)."""
    return tuple(row for line in lines_of(text) for row in _wrap_line(line, max(8, width), style))


def _wrap_line(line: str, width: int, style: Style) -> Iterator[Row]:
    row: list[Cluster] = []
    used = gap = indent = 0
    is_first, has_text = True, False
    for token in _tokens(line):
        if token.is_blank:
            if is_first:
                used = min(token.width, width // 2)
                row, indent = _blanks(used), min(used + _HANGING, width // 2)
            else:
                gap = token.width
            is_first = False
            continue
        if has_text and used + gap + token.width > width:
            yield _row(row, style)
            row, used, gap = _blanks(indent), indent, 0
        is_first = False
        row += _blanks(gap)
        used, gap, has_text = used + gap, 0, True
        for part in token.parts:
            if used + part.width > width:
                yield _row(row, style)
                row, used = _blanks(indent), indent
            row.append(part)
            used += part.width
    yield _row(row, style)


def _blanks(count: int) -> list[Cluster]:
    return [Cluster(" " * count, count)] if count else []


def _tokens(line: str) -> Iterator[_Token]:
    for run in _RUNS.findall(line):
        if run[0] == " ":
            yield _Token((Cluster(run, len(run)),) if len(run) == 1 else (Cluster(" ", 1),) * len(run), len(run))
        elif _PLAIN.fullmatch(run):
            yield _Token(tuple(Cluster(character, 1) for character in run), len(run))
        else:
            yield from _words(clusters(run))


def _words(parts: Iterable[Cluster]) -> Iterator[_Token]:
    """Adjacent narrow characters form a word; every wide one is a word with the punctuation after it."""
    word: list[Cluster] = []
    for part in parts:
        is_alone = part.width > 1 and not part.is_mark
        before_is_alone = bool(word) and word[-1].width > 1 and not word[-1].is_mark
        if word and part.text not in _NEVER_FIRST and (is_alone or before_is_alone):
            yield _token(word)
            word = []
        for piece in _small(part):
            word.append(piece)
    if word:
        yield _token(word)


def _small(part: Cluster) -> Iterator[Cluster]:
    """A visible code may be broken anywhere, like a long word."""
    if part.is_mark:
        yield from (Cluster(character, 1, is_mark=True) for character in part.text)
    else:
        yield part


def _token(parts: list[Cluster]) -> _Token:
    return _Token(tuple(parts), sum(part.width for part in parts))


def _row(parts: list[Cluster], style: Style) -> Row:
    pieces: list[Piece] = []
    for part in parts:
        shown: Style = "mark" if part.is_mark else style
        if pieces and pieces[-1].style == shown:
            pieces[-1] = Piece(pieces[-1].text + part.text, shown)
        else:
            pieces.append(Piece(part.text, shown))
    return tuple(pieces)


def width_of(text: str) -> int:
    """Width of visible text in cells, or slightly more."""
    return len(text) if text.isascii() else sum(part.width for part in clusters(text))


def cut(text: str, width: int) -> str:
    """Untrusted text on one visible line, cut to `width` cells with an ellipsis."""
    shown = in_one_line(text)
    if width_of(shown) <= width:
        return shown
    kept, used = "", 0
    for part in clusters(shown):
        if used + part.width > width - 1:
            break
        kept, used = kept + part.text, used + part.width
    return (kept + "…")[: max(0, width)]


def flow(pieces: Iterable[Piece], width: int, between: str = "  ") -> tuple[Row, ...]:
    """Place pieces side by side in as many rows as needed; no piece is broken, but one that is too wide is cut."""
    rows: list[list[Piece]] = [[]]
    used = 0
    for piece in pieces:
        text = cut(piece.text, width)
        size = width_of(text)
        if rows[-1] and used + len(between) + size > width:
            rows.append([])
            used = 0
        if rows[-1]:
            rows[-1].append(Piece(between))
            used += len(between)
        rows[-1].append(Piece(text, piece.style))
        used += size
    return tuple(tuple(row) for row in rows)
