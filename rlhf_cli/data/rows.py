"""A row as it stands in a file, before anybody asked what it means, and how values are shown in messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_cli.errors import DataError


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
        place: `file:line`, 1-based; `file:row N` where a format has no lines.
        fields: name -> value.
        is_text: every value is text because the format knows nothing else (CSV), so lists stand in it as JSON.
        may_be_blank: answers are a model's own, as `rlhf label` kept them, and may be empty.
    """

    place: str
    fields: Mapping[str, object]
    is_text: bool = False
    may_be_blank: bool = False

    def error(self, message: str, hint: str | None = None) -> DataError:
        """A `DataError` at this row."""
        return DataError(f"{self.place}: {message}", hint=hint)

    def excerpt(self) -> str:
        """Beginning of the row, to recognize it by."""
        return shown(dict(self.fields), limit=160)


def shown(value: object, limit: int = 60) -> str:
    """A value as a message shows it: shortened JSON in which nothing can control a terminal."""
    if isinstance(value, str) and len(value) > limit:
        value = value[: limit + 1]  # spares the encoding of a megabyte of which a line is shown
    text = printable(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str) -> str:
    """Text with control, surrogate and direction characters escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def listed(names: Mapping[str, object] | list[str], most: int = 8) -> str:
    """Names as a message lists them."""
    shown_names = [f"`{printable(str(name))[:40]}`" for name in list(names)[:most]]
    return ", ".join(shown_names) + (", …" if len(names) > most else "") if shown_names else "no fields"
