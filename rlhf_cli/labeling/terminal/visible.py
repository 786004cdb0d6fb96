"""Makes untrusted text safe to display: control, bidirectional and invisible characters become visible codes.

Nothing is dropped: an annotator must see that a completion contains an escape sequence or a bidirectional mark.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from rich.cells import get_character_cell_size

TAB = 4
_MAX_CLUSTER = 8
_MAX_COMBINING = 6
_PLAIN = re.compile(r"[ -~]*")
_JOINERS = "\u200c\u200d"
_SELECTORS = "\ufe0e\ufe0f"
_HIDDEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0d\uffa0\U000e0100-\U000e01ef]"
)
"""Characters without width or ink that Unicode classifies as letters and marks (Default_Ignorable, and the blank
Braille pattern): they can hide data."""
_NEWER_EMOJI = range(0x1F000, 0x1FC00)
"""Newer than Python's character table."""


class Cluster(NamedTuple):
    """A character with all its combining characters, displayed in one place.

    Attributes:
        text: to display.
        width: in cells, at least as many as any terminal uses for it.
        is_mark: a visible code that replaces a character.
        length: number of original characters.
    """

    text: str
    width: int
    is_mark: bool = False
    length: int = 1


def escaped(character: str) -> str:
    r"""The visible code of a character: `\x1b` for a control, `<U+202E>` for anything else."""
    code = ord(character)
    if character in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[character]
    return f"\\x{code:02x}" if code < 0xA0 else f"<U+{code:04X}>"


def clusters(line: str) -> Iterator[Cluster]:
    """Split one line into clusters; line feeds and tabs become codes too."""
    if _PLAIN.fullmatch(line):
        yield from (Cluster(character, 1) for character in line)
        return
    pending, width, length, combining, has_joiner = "", 0, 0, 0, False
    for index, character in enumerate(line):
        following = line[index + 1 : index + 2]
        if not _is_shown(character, pending, following):
            if pending:
                yield Cluster(pending, width, length=length)
            yield Cluster(escaped(character), len(escaped(character)), is_mark=True)
            pending, width, length, combining, has_joiner = "", 0, 0, 0, False
            continue
        size = get_character_cell_size(character)
        extends = bool(pending) and (size == 0 or has_joiner or _is_flag(pending, character) or _is_tone(character))
        if extends and width + size <= _MAX_CLUSTER and combining < _MAX_COMBINING:
            pending += character
            width += size + (character == "\ufe0f" and width == 1)
            length, combining = length + 1, combining + (size == 0)
        else:
            if pending:
                yield Cluster(pending, width, length=length)
            # without a base, a combining mark would attach to whatever is on its left on the screen
            pending, width = (character, size) if size else ("\u25cc" + character, 1)
            length, combining = 1, int(size == 0)
        has_joiner = character == "\u200d"
    if pending:
        yield Cluster(pending, width, length=length)


def _is_shown(character: str, before: str, after: str) -> bool:
    if character.isprintable():
        return not _HIDDEN.match(character) and (character not in _SELECTORS or _carries(before, ""))
    if character in _JOINERS:
        return _carries(before, _JOINERS) and bool(after) and not after.isascii() and after.isprintable()
    kind = unicodedata.category(character)
    return kind == "Zs" or (kind == "Cn" and ord(character) in _NEWER_EMOJI)


def _carries(before: str, but_not: str) -> bool:
    """Whether a joiner or selector after this text changes its look instead of hiding there."""
    if not before or before[-1] in _SELECTORS + but_not:
        return bool(before) and before[-1] == "\ufe0f" and but_not != ""
    return not before[-1].isascii() or before[-1] in "#*0123456789"


def _is_flag(pending: str, character: str) -> bool:
    letters = range(0x1F1E6, 0x1F200)
    return len(pending) == 1 and ord(pending) in letters and ord(character) in letters


def _is_tone(character: str) -> bool:
    return 0x1F3FB <= ord(character) <= 0x1F3FF


def lines_of(text: str) -> list[str]:
    """Split a text into lines; tabs become spaces up to the next tab stop."""
    return [line.expandtabs(TAB) if "\t" in line else line for line in text.replace("\r\n", "\n").split("\n")]


def in_one_line(text: str) -> str:
    """The text on one visible line."""
    return "".join(cluster.text for cluster in clusters(text))
