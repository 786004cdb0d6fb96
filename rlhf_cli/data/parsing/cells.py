"""Structure that a file holds as text, as tables do: JSON is decoded, and what Python prints of a list.

pandas writes lists into a CSV file as Python prints them: `[{'role': 'user', ...}]`, and without commas if they were
read from Parquet. Such text is decoded only if printing the result gives the very same text; all other is refused.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace

from rlhf_cli.data.readers.rows import Row, shown

_ROLE, _CONTENT = ("role", "from"), ("content", "value")
_PYTHON = re.compile(r"(array\(|[\s\[(])*\{\s*'\w+'\s*:")
_PYTHON_TEXTS = re.compile(r"\s*(array\()?\[\s*'")
_JSON_TURNS = re.compile(r'[\s\[]*\{\s*"(role|from|content|value)"\s*:')
TO_JSON = (
    "it cannot be read back: write the data once more, from where it was read before, as JSON lines: "
    "`to_json(FILE, orient='records', lines=True)`"
)
_LONGEST_PRINTED = 1_000_000
"""Characters of the longest text that is parsed as Python's notation."""


def decode_cells(row: Row) -> Row:
    """Decode messages that are written as text, in JSON or as Python prints them; put a single message into a list.

    Text that is not a whole conversation stays text, so that a completion may be any other JSON.
    """
    changed = {name: found for name, value in row.fields.items() if (found := _turns(value)) is not None}
    return replace(row, fields={**row.fields, **changed}) if changed else row


def _turns(value: object) -> list[object] | None:
    """The messages that a value holds in another way than as a list; None if it holds none."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = _printed(value) if _PYTHON.match(value) else None
        if isinstance(value, list) and value and all(map(is_turn, value)):
            return value
    return [value] if is_turn(value) else None


def _printed(text: str) -> object:
    """The list or dictionary that Python prints as this text, entries separated by commas or by white space.

    None if there is none: printing what was parsed must give the text again. Python joins texts without a comma between
    them, and shortens long arrays by dots.
    """
    text = text.strip()
    if len(text) > _LONGEST_PRINTED:
        return None
    for candidate in (text, re.sub(r"\}\s+\{", "}, {", text)):
        try:
            with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
                value = ast.literal_eval(candidate)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, dict) and repr(value) == text:
            return value
        if isinstance(value, list) and _prints(value, text):
            return value
    return None


def _prints(entries: list[object], text: str) -> bool:
    """Whether a text is what Python prints for a list, entries separated by commas or by white space."""
    at = 1
    for number, entry in enumerate(entries):
        if number:
            separator = _SEPARATOR.match(text, at)
            if separator is None:
                return False
            at = separator.end()
        printed = repr(entry)
        if not text.startswith(printed, at):
            return False
        at += len(printed)
    return text.startswith("[") and text[at:] == "]"


_SEPARATOR = re.compile(r", |\s+")


def is_turn(value: object) -> bool:
    """Whether a value has the fields of a message."""
    if not isinstance(value, Mapping):
        return False
    return any(name in value for name in _ROLE) and any(name in value for name in (*_CONTENT, "tool_calls"))


def refuse_notation(row: Row, field: str, text: str) -> None:
    """Raise `DataError` if a text is messages that `decode_cells` could not decode: cut off, or printed by a program.

    Training on it would teach brackets and quotes in place of the conversation.
    """
    beginning = text[:4000]
    if _PYTHON.match(beginning) and re.search(r"'(role|from)'\s*:", text) and re.search(r"'(content|value)'\s*:", text):
        raise row.error(f"`{field}` holds messages in Python's notation, {shown(text, 40)}", TO_JSON)
    if _JSON_TURNS.match(beginning) and re.search(r'"(role|from)"\s*:', text) and not _is_json(text):
        raise row.error(
            f"`{field}` begins like messages in JSON but is not valid JSON, {shown(text, 40)}: cut off?",
            "spreadsheets cut cells after 32,767 characters; write the file as JSON lines",
        )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def decoded_cell(row: Row, field: str, value: object) -> object:
    """Decode a list that is written as JSON, or as Python prints it, in a cell of a text-only format (CSV)."""
    if not row.is_text or not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        is_printed = _PYTHON.match(value) or _PYTHON_TEXTS.match(value)
        if is_printed and (found := _printed(value)) is not None:
            return found
        raise row.error(
            f"`{field}` is {shown(value)}, which is not a JSON list",
            TO_JSON if is_printed else "lists in CSV are written as JSON; JSONL is easier to write",
        ) from error
