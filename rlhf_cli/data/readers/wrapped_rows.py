"""Records that stand in one object: `{"data": [...]}`, rows of the hub's viewer, and columns as pandas writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rlhf_cli.data.readers.rows import Row
from rlhf_cli.errors import DataError

_LISTS = ("data", "rows", "records", "examples", "instances", "train")
_RECORD = frozenset({"prompt", "messages", "completion", "chosen", "completions", "instruction"})
"""Fields of records, beside which a list is not a wrapper."""


def unwrapped_rows(rows: Iterator[Row]) -> Iterator[Row]:
    """Yield rows; if the first is the only one and holds the records, yield these."""
    first, second = next(rows, None), None
    if first is None:
        return
    inner = _records_of(first)
    if inner is not None:
        second = next(rows, None)
        if second is None:
            yield from inner
            return
    yield first
    if second is not None:
        yield second
    yield from rows


def _records_of(row: Row) -> list[Row] | None:
    for name in _LISTS:
        held = row.fields.get(name)
        if isinstance(held, list) and held and all(isinstance(one, dict) for one in held):
            if not _RECORD.isdisjoint(row.fields):
                return None
            return [_inner_row(f"{row.location} ({name}[{index}])", one) for index, one in enumerate(held)]
    columns = list(row.fields.values())
    if len(columns) > 1 and all(isinstance(column, dict) and column for column in columns):
        keys = [list(column) for column in columns if isinstance(column, dict)]
        if all(key.isdigit() for key in keys[0]) and all(one == keys[0] for one in keys):
            return [
                Row(f"{row.location} (index {key})", {name: _held(column, key) for name, column in row.fields.items()})
                for key in keys[0]
            ]
    return None


def _held(column: object, key: str) -> object:
    return column[key] if isinstance(column, Mapping) else None


def _inner_row(location: str, fields: dict[str, object]) -> Row:
    """A record of a list; the viewer of the hub puts one more object around it."""
    inner = fields.get("row")
    if "row_idx" not in fields or not isinstance(inner, dict):
        return Row(location, fields)
    if fields.get("truncated_cells"):
        raise DataError(
            f"{location}: the viewer cut off some of its cells", hint="name the data set itself, `org/name`"
        )
    return Row(location, inner)
