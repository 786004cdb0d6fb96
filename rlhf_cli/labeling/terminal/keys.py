"""Parses terminal input into keys: escape sequences in any number of parts, pasted text, and terminal reports."""

from __future__ import annotations

import codecs
import re
from typing import Literal, NamedTuple

Name = Literal[
    "text", "paste", "enter", "backspace", "delete", "tab", "backtab", "escape", "up", "down", "left", "right",
    "pageup", "pagedown", "home", "end", "control", "unknown",
]  # fmt: skip

ESCAPE_SECONDS = 0.06
"""A lone escape byte is the Escape key if nothing follows within this time."""
PASTE_SECONDS = 2.0
"""A paste without an end marker ends if nothing follows within this time."""
_MAX_PASTE = 40_000
_CSI = re.compile(rb"\x1b\[([0-?]*)[ -/]*([@-~])")
_STRING = re.compile(rb"\x1b[]PX^_][^\x03]*?(?:\x07|\x1b\\|(?=\x03))", re.DOTALL)
"""OSC, DCS and similar strings up to their end; Ctrl-C ends them too, so that nobody is locked in."""
_REPORTS = b"IOMmRcnyt"
"""Final bytes of mouse and focus reports, and of other terminal responses."""
_PASTE_BEGINS, _PASTE_ENDS = b"\x1b[200~", b"\x1b[201~"
_LETTERS: dict[bytes, Name] = {
    b"A": "up", b"B": "down", b"C": "right", b"D": "left", b"H": "home", b"F": "end", b"Z": "backtab", b"M": "enter",
}  # fmt: skip
_NUMBERS: dict[bytes, Name] = {
    b"1": "home", b"3": "delete", b"4": "end", b"5": "pageup", b"6": "pagedown", b"7": "home", b"8": "end",
}  # fmt: skip
_CONTROLS: dict[int, Name] = {0x09: "tab", 0x0A: "enter", 0x0D: "enter", 0x08: "backspace", 0x7F: "backspace"}


class Key(NamedTuple):
    """A key.

    Attributes:
        name: `text` is a character, `control` a letter with Ctrl.
        text: the character, the letter, or the pasted text.
    """

    name: Name
    text: str = ""


class KeyReader:
    """Incremental parser: bytes may arrive in parts of any size.

    Incomplete sequences are held back and never interpreted as letters. A lone escape byte is the exception; the rest
    of its sequence is still recognized and dropped if it arrives later.
    """

    def __init__(self) -> None:
        self._bytes = b""
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._had_escape = False

    @property
    def is_waiting(self) -> bool:
        """Whether incomplete bytes are held back."""
        return bool(self._bytes)

    def feed(self, received: bytes) -> list[Key]:
        """Parse bytes; returns all complete keys."""
        self._bytes += received
        if self._had_escape and self._bytes[:1] in (b"[", b"O"):
            self._bytes = b"\x1b" + self._bytes
        self._had_escape = False
        keys: list[Key] = []
        while self._bytes:
            key, length = self._first()
            if not length:
                break
            self._bytes = self._bytes[length:]
            if key is not None:
                keys.append(key)
        return keys

    def expire(self, idle: float) -> list[Key]:
        """Keys of held-back bytes after `idle` seconds: a lone escape byte, or a paste without an end."""
        if self._bytes == b"\x1b" and idle >= ESCAPE_SECONDS:
            self._bytes, self._had_escape = b"", True
            return [Key("escape")]
        if self._bytes.startswith(_PASTE_BEGINS) and idle >= PASTE_SECONDS:
            pasted, self._bytes = self._bytes[len(_PASTE_BEGINS) :], b""
            return [_paste(pasted)]
        return []

    def _first(self) -> tuple[Key | None, int]:
        """The first key and its length in bytes; 0 if it is incomplete."""
        first = self._bytes[0]
        if first == 0x1B:
            return self._sequence()
        if first in _CONTROLS:
            return Key(_CONTROLS[first]), 1
        if first < 0x20:
            return Key("control", chr(first + 0x60)), 1
        text = self._decode.decode(self._bytes[:1])
        return (Key("text", text) if text.isprintable() else Key("unknown")) if text else None, 1

    def _sequence(self) -> tuple[Key | None, int]:
        data = self._bytes
        if data.startswith(_PASTE_BEGINS):
            end = data.find(_PASTE_ENDS)
            return (_paste(data[len(_PASTE_BEGINS) : end]), end + len(_PASTE_ENDS)) if end >= 0 else (None, 0)
        if len(data) == 1:
            return None, 0
        kind = data[1:2]
        if kind == b"[":
            return self._control_sequence()
        if kind == b"O":
            if len(data) == 2:
                return None, 0
            return Key(_LETTERS.get(data[2:3], "unknown")), 3 if 0x20 <= data[2] <= 0x7E else 2
        if kind in b"]PX^_":
            found = _STRING.match(data)
            return None, found.end() if found else 0
        if kind == b"\x1b":
            return Key("escape"), 1
        return self._with_alt()

    def _with_alt(self) -> tuple[Key | None, int]:
        data = self._bytes
        end = 1 + _length_of_character(data[1])
        broken = next((at for at, byte in enumerate(data[2:end], 2) if not 0x80 <= byte < 0xC0), 0)
        return (Key("unknown"), broken or end) if broken or len(data) >= end else (None, 0)

    def _control_sequence(self) -> tuple[Key | None, int]:
        data = self._bytes
        if data.startswith(b"\x1b[M"):  # a mouse report with three bytes of coordinates
            return (None, 6) if len(data) >= 6 else (None, 0)
        if data.startswith(b"\x1b[["):  # function keys of the Linux console
            return (Key("unknown"), 4) if len(data) >= 4 else (None, 0)
        found = _CSI.match(data)
        if found is None:
            broken = next((at for at, byte in enumerate(data[2:], 2) if not 0x20 <= byte <= 0x7E), 0)
            return (Key("unknown"), broken) if broken else (None, 0)
        parameters, letter = found.groups()
        if letter in _REPORTS:
            return None, found.end()
        if letter == b"~":
            return Key(_NUMBERS.get(parameters.split(b";")[0], "unknown")), found.end()
        return Key(_LETTERS.get(letter, "unknown")), found.end()


def _length_of_character(first: int) -> int:
    """Length of a UTF-8 character in bytes, from its first byte."""
    return 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4


def _paste(pasted: bytes) -> Key:
    return Key("paste", pasted[:_MAX_PASTE].decode("utf-8", errors="replace"))
