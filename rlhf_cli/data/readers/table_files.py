"""Reads CSV, TSV and Parquet row by row, in memory bounded by a row or a row group."""

from __future__ import annotations

import csv
import itertools
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from rlhf_cli.data.readers.rows import Row, listed, shown
from rlhf_cli.data.readers.text_files import MAX_RECORD_BYTES, LineDecoder, numbered_lines, opened, opened_text
from rlhf_cli.errors import DataError

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_ROWS_AT_ONCE = 256


def csv_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a CSV file (RFC 4180: double quotes, a header), numbered by their first line.

    The delimiter is what splits the header into the most fields, or what a first line `sep=;` says. Rows without any
    text are not yielded. Windows-1252 is read if no text before it was UTF-8.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)
    with opened_text(path) as file:
        decoder = LineDecoder(allows_windows=True)
        delimiter, numbered = _delimited(numbered_lines(path, file, decoder))
        lines = _Remembered(numbered)
        reader = csv.reader(lines, strict=True, delimiter=delimiter)
        header: list[str] | None = None
        while True:
            start = lines.begin_record()
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise _broken_csv(path, start, lines.record, delimiter, error) from error
            if cells is None:
                return
            if not any(map(str.strip, cells)):
                continue
            if header is None:
                header = _checked_header(path, start, cells)
            elif len(cells) != len(header):
                raise _wrong_width(path, start, cells, header)
            else:
                fields = dict(zip(header, cells, strict=True))
                fields.pop("", None)
                yield Row(f"{path}:{start}", fields, is_text=True, encoding=decoder.encoding)


def _delimited(lines: Iterator[tuple[int, str]]) -> tuple[str, Iterator[tuple[int, str]]]:
    """The delimiter, and the lines from the header on."""
    first: list[tuple[int, str]] = []
    for number, line in lines:
        if said := re.fullmatch(r'"?sep=(.)"?\s*', line):
            return said[1], lines
        first.append((number, line))
        if line.strip():
            break
    header = first[-1][1] if first else ""
    fields = {delimiter: len(next(csv.reader([header], delimiter=delimiter), [])) for delimiter in ",;\t|"}
    return max(fields, key=lambda delimiter: fields[delimiter]), itertools.chain(first, lines)


class _Remembered:
    """Yields lines and keeps those of the current record, to find where a quote began."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self._lines = lines
        self._next = next(lines, None)
        self.record: deque[str] = deque()
        self._size = 0

    def begin_record(self) -> int:
        self.record.clear()
        self._size = 0
        return self._next[0] if self._next else 0

    def __iter__(self) -> _Remembered:
        return self

    def __next__(self) -> str:
        if self._next is None:
            raise StopIteration
        _, line = self._next
        self._next = next(self._lines, None)
        self.record.append(line)
        self._size += len(line)
        if self._size > MAX_RECORD_BYTES:
            raise csv.Error(f"a record is longer than {MAX_RECORD_BYTES >> 20} MiB")
        return line


def _checked_header(path: Path, start: int, names: list[str]) -> list[str]:
    for name in names:
        if name and names.count(name) > 1:
            raise DataError(f"{path}:{start}: the column {shown(name)} occurs twice", hint="rename one of them")
    return names


def _wrong_width(path: Path, start: int, cells: list[str], header: list[str]) -> DataError:
    return DataError(
        f"{path}:{start}: {len(cells)} fields, but the header has {len(header)} ({listed(header)}); the row begins "
        f"{shown(cells[0])}",
        hint='put text with a comma, a quote or a line end in double quotes, and write a quote as `""`',
    )


def _broken_csv(path: Path, start: int, record: deque[str], delimiter: str, error: csv.Error) -> DataError:
    opened_at = _line_of_open_quote(record, delimiter)
    if opened_at is not None:
        return DataError(
            f"{path}:{start + opened_at}: a quote opens on this line and is not closed where a field ends ({error}): "
            f"{shown(record[opened_at].strip(), 40)}",
            hint='close it; a quote inside a quoted field is written `""`',
        )
    if "new-line character" in str(error):
        return DataError(
            f"{path}:{start}: the lines end in different ways: CR, and LF or CRLF",
            hint="save the file again as CSV in UTF-8, or as JSONL",
        )
    return DataError(f"{path}:{start}: not CSV: {error}", hint="save the file as CSV with commas, or as JSONL")


def _line_of_open_quote(record: deque[str], delimiter: str) -> int | None:
    """Index of the line where the unclosed quoted field of a broken record begins; None if there is none."""
    inside, opened_at, at_field_start = False, None, True
    for index, line in enumerate(record):
        position = 0
        while position < len(line):
            character = line[position]
            if inside:
                if character == '"' and line[position + 1 : position + 2] == '"':
                    position += 1
                elif character == '"':
                    inside = False
                    if line[position + 1 : position + 2] not in (delimiter, "\r", "\n", ""):
                        return opened_at
            elif character == '"' and at_field_start:
                inside, opened_at = True, index
            at_field_start = not inside and character in (delimiter, "\r", "\n")
            position += 1
    return opened_at if inside else None


def parquet_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file, numbered `row N` from 1; gzip is unpacked to a temporary file first."""
    with opened(path) as file, _seekable(file) as parquet:
        yield from _parquet_rows(path, parquet)


class _seekable:  # noqa: N801  (a context manager used like a function)
    """The file itself, or a temporary copy if seeking in it is slow (gzip)."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._copy = None

    def __enter__(self) -> BinaryIO:
        import gzip

        if not isinstance(self._file, gzip.GzipFile):
            return self._file
        self._copy = tempfile.TemporaryFile()
        shutil.copyfileobj(self._file, self._copy)
        self._copy.seek(0)
        return self._copy  # type: ignore[return-value]

    def __exit__(self, *_: object) -> None:
        if self._copy is not None:
            self._copy.close()


def _parquet_rows(path: Path, file: BinaryIO) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        parquet = pq.ParquetFile(file)
        names = _plain_leaves(parquet)
        for batch in parquet.iter_batches(batch_size=_ROWS_AT_ONCE, columns=names):
            for fields in batch.to_pylist():
                number += 1
                yield Row(f"{path}:row {number}", {name: _decoded(value) for name, value in fields.items()})
    except (pa.ArrowException, OSError) as error:
        where = f"{path}:row {number + 1}" if number else str(path)
        raise DataError(
            f"{where}: not Parquet, or truncated: {_first_sentence(error)}",
            hint="copy or download the file again",
        ) from error


def _plain_leaves(parquet: pq.ParquetFile) -> list[str]:
    """Paths of what holds text, numbers or booleans; times and bytes inside of columns are not read."""
    schema, columns = parquet.schema, set(parquet.schema_arrow.names)
    leaves = [schema.column(index) for index in range(len(schema))]
    return [leaf.path for leaf in leaves if _is_plain(leaf.physical_type, leaf.logical_type.type, leaf.path in columns)]


def _is_plain(physical: str, logical: str, is_column: bool) -> bool:
    if physical == "BYTE_ARRAY":
        return logical in ("STRING", "JSON", "ENUM") or (logical == "NONE" and is_column)
    return physical in ("BOOLEAN", "FLOAT", "DOUBLE", "INT32", "INT64") and logical in ("NONE", "INT", "NULL")


def _decoded(value: object) -> object:
    """Text that a column holds as bytes; other bytes stay as they are."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value


def _first_sentence(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
