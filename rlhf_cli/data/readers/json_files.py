"""Reads JSON lines and JSON arrays record by record, in memory bounded by the longest record."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path

from rlhf_cli.data.readers.rows import Row, shown
from rlhf_cli.data.readers.text_files import MAX_RECORD_BYTES, numbered_lines, opened_text, text_chunks
from rlhf_cli.data.readers.wrapped_rows import unwrapped_rows
from rlhf_cli.errors import DataError

_JSON_SPACE = " \t\r\n"


class _RepeatedKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        raise _RepeatedKeyError(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return fields


_decoder = json.JSONDecoder(object_pairs_hook=_unique)  # NaN is refused where it is used


def json_rows(path: Path) -> Iterator[Row]:
    """Yield the records of JSON lines, of one array, of objects over several lines, or of an object around a list.

    The beginning of the text decides, not the name.
    """
    with opened_text(path) as file:
        beginning = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
    if beginning.startswith(b"["):
        rows = _array_rows(path)
    elif re.match(rb"\{([^\n]*[\[{,:])?[ \t\r]*\n", beginning):  # its first line ends within an object
        rows = _object_rows(path)
    else:
        rows = _line_rows(path)
    yield from unwrapped_rows(rows)


def _line_rows(path: Path) -> Iterator[Row]:
    with opened_text(path) as file:
        for number, line in numbered_lines(path, file):
            text = line.strip(_JSON_SPACE)
            if not text:
                continue
            location = f"{path}:{number}"
            indent = len(line) - len(line.lstrip(_JSON_SPACE))
            value = _decoded(location, text, indent)
            yield Row(location, _as_object(location, value))


def _decoded(location: str, text: str, indent: int) -> object:
    try:
        return _decoder.decode(text)
    except ValueError as error:
        raise _explained(location, text, error, column_of=lambda at: at + indent + 1) from error
    except RecursionError as error:
        raise _too_deep(location) from error


def _too_deep(location: str) -> DataError:
    return DataError(
        f"{location}: the JSON is nested too deeply", hint="a record holds text, numbers, lists and messages"
    )


def _as_object(location: str, value: object) -> dict[str, object]:
    if isinstance(value, dict):
        return value
    raise DataError(
        f"{location}: a record must be an object with fields, got {shown(value)}",
        hint='one `{"field": "text", ...}` per line, or one array of them',
    )


def _explained(location: str, text: str, error: ValueError, column_of) -> DataError:
    """The decoder's error with the probable cause and how to fix it."""
    if isinstance(error, _RepeatedKeyError):
        return DataError(
            f"{location}: the field {shown(str(error))} stands twice in one record", hint="keep one of them"
        )
    if not isinstance(error, json.JSONDecodeError):
        return DataError(  # the only other reason why the decoder refuses a text
            f"{location}: has a number with thousands of digits", hint="write such a number as text, in double quotes"
        )
    column, rest = column_of(error.pos), text[error.pos :]
    quote = re.match(r"\s*('|None\b|True\b|False\b)", rest)
    if quote:
        what = "single quotes" if quote[1] == "'" else f"`{quote[1]}`"
        return DataError(
            f"{location}: not JSON: {what} at column {column} ({shown(text[:80], 40)})",
            hint="this is Python's notation; write the file with `json.dumps`: double quotes, null, true, false",
        )
    if text == "{" or (text.startswith("{") and error.pos >= len(text.rstrip())) or "Unterminated string" in error.msg:
        return DataError(
            f"{location}: the record ends in the middle, at column {column}: truncated?",
            hint="write one whole record per line, or one JSON array; if the file was cut off, copy it again or "
            "delete the last line",
        )
    return DataError(
        f"{location}: not JSON at column {column}: {error.msg[:1].lower()}{error.msg[1:]}, found "
        f"{shown(rest[:40], 30)}",
        hint="fix the line by hand, or write the file with a JSON library",
    )


class _Window:
    """The part of a text that is being decoded, with its line and column; decoded text is dropped."""

    def __init__(self, path: Path, chunks: Iterator[str]) -> None:
        self.path, self._chunks = path, chunks
        self.text, self.at, self.line = "", 0, 1
        self._columns_gone = 0
        self.ended = False

    def more(self) -> None:
        """At least double the held text, so that a long record is decoded only a few times."""
        newline = self.text.rfind("\n", 0, self.at)
        self._columns_gone = self.at + self._columns_gone if newline < 0 else self.at - newline - 1
        held = self.text[self.at :]
        if len(held) > MAX_RECORD_BYTES:
            raise DataError(
                f"{self.location()}: the record is longer than {MAX_RECORD_BYTES >> 20} MiB or does not end",
                hint="check that a closing quote or bracket is not missing",
            )
        pieces, size = [held], 0
        while size <= len(held) and not self.ended:
            piece = next(self._chunks, "")
            self.ended = not piece
            pieces.append(piece)
            size += len(piece)
        self.text, self.at = "".join(pieces), 0

    def location(self, at: int | None = None) -> str:
        return f"{self.path}:{self.line + self.text.count(chr(10), self.at, self.at if at is None else at)}"

    def column(self, at: int) -> int:
        newline = self.text.rfind("\n", 0, at)
        return at + self._columns_gone + 1 if newline < 0 else at - newline

    def move(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def next_character(self) -> str:
        """The next character that is not white space, without reading it; empty at the end."""
        while True:
            to = self.at
            while to < len(self.text) and self.text[to] in _JSON_SPACE:
                to += 1
            self.move(to)
            if to < len(self.text):
                return self.text[to]
            if self.ended:
                return ""
            self.more()


def _object_rows(path: Path) -> Iterator[Row]:
    """Objects one after the other, each over any number of lines."""
    with opened_text(path) as file:
        window = _Window(path, text_chunks(path, file))
        while window.next_character():
            location = window.location()
            yield Row(location, _as_object(location, _next_value(window)))


def _array_rows(path: Path) -> Iterator[Row]:
    with opened_text(path) as file:
        window = _Window(path, text_chunks(path, file))
        window.next_character()
        window.move(window.at + 1)
        if window.next_character() != "]":
            while True:
                location = window.location()
                yield Row(location, _as_object(location, _next_value(window)))
                if not _another(window):
                    break
        window.move(window.at + 1)
        if window.next_character():
            raise DataError(
                f"{window.location()}: text follows the end of the array: {shown(window.text[window.at :][:40], 30)}",
                hint="write one array per file, or one object per line",
            )


def _another(window: _Window) -> bool:
    """Whether a comma and another record follow, rather than the end of the array."""
    character = window.next_character()
    if character == ",":
        window.move(window.at + 1)
        if window.next_character() == "]":
            raise DataError(
                f"{window.location()}: not JSON: a comma before the end of the array", hint="delete the comma"
            )
        return True
    if character == "]":
        return False
    if not character:
        raise DataError(f"{window.location()}: the array ends before its `]`: truncated?", hint="copy the file again")
    raise DataError(
        f"{window.location()}: not JSON at column {window.column(window.at)}: expecting `,` between two records, found "
        f"{shown(window.text[window.at :][:40], 30)}",
        hint="records of an array are separated by commas",
    )


def _next_value(window: _Window) -> object:
    if not window.next_character():
        raise DataError(f"{window.location()}: the array ends before its `]`: truncated?", hint="copy the file again")
    while True:
        try:
            value, end = _decoder.raw_decode(window.text, window.at)
        except ValueError as error:
            if _may_be_cut(window, error):
                window.more()
                continue
            at = error.pos if isinstance(error, json.JSONDecodeError) else window.at
            shifted = window.text[window.at :]
            if isinstance(error, json.JSONDecodeError):
                error = json.JSONDecodeError(error.msg, shifted, at - window.at)
            raise _explained(window.location(at), shifted, error, lambda i: window.column(i + window.at)) from error
        except RecursionError as error:
            raise _too_deep(window.location()) from error
        if end == len(window.text) and not window.ended:
            window.more()  # a number may continue in the next piece
            continue
        window.move(end)
        return value


def _may_be_cut(window: _Window, error: ValueError) -> bool:
    """Whether the error may come from the end of the window rather than from the text."""
    if window.ended or not isinstance(error, json.JSONDecodeError):
        return False
    longest_token = 16  # an escape or a literal cut in two
    return "Unterminated string" in error.msg or error.pos >= len(window.text) - longest_token
