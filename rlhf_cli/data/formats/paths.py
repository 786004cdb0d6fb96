"""Paths to values of a row: `column`, `column.field`, `column[].field` (that field of each object in a list)."""

from __future__ import annotations

import json
from collections.abc import Mapping

ABSENT = object()
"""What a path gives that leads nowhere."""


def value_at(fields: Mapping[str, object], path: str) -> object:
    """The value at a path: a list for a path with `[]`, `ABSENT` if it leads nowhere. JSON text in cells is decoded."""
    if path in fields:
        return fields[path]
    head, is_list, rest = path.partition("[]")
    if is_list:
        members = _decoded(value_at(fields, head))
        if not isinstance(members, list) or not members:
            return ABSENT
        if not rest:
            return members
        found = [value_at(member, rest[1:]) if isinstance(member, Mapping) else ABSENT for member in members]
        return ABSENT if all(value is ABSENT for value in found) else found
    head, dot, rest = path.partition(".")
    inner = _decoded(fields.get(head, ABSENT)) if dot else ABSENT
    return value_at(inner, rest) if isinstance(inner, Mapping) else ABSENT


def _decoded(value: object) -> object:
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def column_of(path: str) -> str:
    """The column that a path begins in."""
    return path.partition("[]")[0].partition(".")[0]
