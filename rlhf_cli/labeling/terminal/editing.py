"""Edits a line of text: a cursor, and the usual keys of a shell."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from rlhf_cli.labeling.terminal.keys import Key
from rlhf_cli.labeling.terminal.visible import clusters

_WORD = re.compile(r"\S*\s*$")


@dataclass(frozen=True)
class Line:
    """Text and a cursor.

    Attributes:
        text: so far.
        cursor: characters before it.
    """

    text: str = ""
    cursor: int = 0

    @staticmethod
    def of(text: str) -> Line:
        """Create a line with the cursor at its end."""
        return Line(text, len(text))

    def pressed(self, key: Key, limit: int) -> Line | None:
        """Handle a key; returns None for a key without a meaning. Inserts at most up to `limit` characters."""
        before, after = self.text[: self.cursor], self.text[self.cursor :]
        if key.name in ("text", "paste"):
            typed = _typed(key)[: max(0, limit - len(self.text))]
            return Line(before + typed + after, self.cursor + len(typed))
        if key.name == "control":
            return self._control(key.text, before, after)
        if key.name == "backspace":
            kept = before[: self._left(before)]
            return Line(kept + after, len(kept))
        if key.name == "delete":
            return Line(before + after[self._right(after) :], self.cursor)
        moves = {"home": 0, "end": len(self.text), "left": self._left(before)}
        if key.name == "right":
            return replace(self, cursor=self.cursor + self._right(after))
        return replace(self, cursor=moves[key.name]) if key.name in moves else None

    def _control(self, letter: str, before: str, after: str) -> Line | None:
        if letter == "a":
            return replace(self, cursor=0)
        if letter == "e":
            return replace(self, cursor=len(self.text))
        if letter == "u":
            return Line(after, 0)
        if letter == "k":
            return Line(before, len(before))
        if letter == "w":
            kept = _WORD.sub("", before, count=1)
            return Line(kept + after, len(kept))
        return None

    @staticmethod
    def _left(before: str) -> int:
        """Position of the last visible character before the cursor."""
        parts = _as_seen(before)
        return len(before) - (parts[-1] if parts else 0)

    @staticmethod
    def _right(after: str) -> int:
        parts = _as_seen(after)
        return parts[0] if parts else 0


def _as_seen(text: str) -> list[int]:
    """Lengths of the visible characters."""
    return [part.length for part in clusters(text)]


def _typed(key: Key) -> str:
    """Text to insert: pasted text on one line, without control characters."""
    if key.name == "text":
        return key.text
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else " " for c in key.text.replace("\r\n", "\n").strip())
