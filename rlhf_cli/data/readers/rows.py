"""A row of a file before its fields are interpreted, and how messages show values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_cli.errors import DataError


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
        location: `file:line`, 1-based; `file:row N` in formats without lines.
        fields: name -> value.
        is_text: the format is text-only (CSV), so every value is text and lists are written as JSON.
        encoding: of the file.
        may_be_blank: the completions were sampled by a model and kept by `rlhf label`; they may be empty.
    """

    location: str
    fields: Mapping[str, object]
    is_text: bool = False
    may_be_blank: bool = False
    encoding: str = "utf-8"

    def error(self, message: str, hint: str | None = None) -> DataError:
        """A `DataError` at this row."""
        return DataError(f"{self.location}: {message}", hint=hint)

    def excerpt(self) -> str:
        """Beginning of the row, so that a reader recognizes it."""
        return shown(dict(self.fields), limit=160)


def shown(value: object, limit: int = 60) -> str:
    """A value for a message: shortened JSON without characters that control a terminal."""
    if isinstance(value, str) and len(value) > limit:
        value = value[: limit + 1]  # avoids encoding a megabyte to show a line
    text = printable(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str) -> str:
    """Escape control, surrogate and direction characters."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def listed(names: Mapping[str, object] | list[str], most: int = 8) -> str:
    """A list of names for a message."""
    shown_names = [f"`{printable(str(name))[:40]}`" for name in list(names)[:most]]
    return ", ".join(shown_names) + (", …" if len(names) > most else "") if shown_names else "no fields"
