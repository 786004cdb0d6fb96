"""Reads files as numbered UTF-8 lines: detects gzip by its magic bytes, ignores a BOM, refuses other encodings."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rlhf_cli.errors import DataError

MAX_RECORD_BYTES = 64 * 1024 * 1024
"""Longest line or record, so that a file without line ends does not fill the memory."""

CHUNK_BYTES = 1 << 20
_OTHER_COMPRESSION = {b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, unpacked if its content is gzip; read errors become `DataError`."""
    try:
        with path.open("rb") as raw:
            magic = raw.read(6)
            raw.seek(0)
            _refuse_other_compression(path, magic)
            if magic[:2] == b"\x1f\x8b":
                with gzip.GzipFile(fileobj=raw, mode="rb") as unpacked:
                    yield unpacked  # type: ignore[misc]
            else:
                yield raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _bad_gzip(str(path), error) from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {(error.strerror or str(error)).lower()}",
            hint="check the path and its permissions",
        ) from error


def _bad_gzip(location: str, error: Exception) -> DataError:
    cut = isinstance(error, EOFError)
    what = "ends before its end mark: the file is truncated" if cut else f"is damaged: {error}"
    return DataError(
        f"{location}: the gzip data {what}",
        hint="copy or download it again; `gzip -t FILE` checks it",
    )


def head(path: Path, size: int = 4096) -> bytes:
    """The first bytes of a file, unpacked."""
    with opened(path) as file:
        return file.read(size)


def refuse_non_utf8(path: Path, beginning: bytes) -> None:
    """Raise `DataError` if the first bytes are UTF-16, UTF-32 or not text."""
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or _looks_like_utf16(beginning):
        raise DataError(
            f"{path}:1: the text must be UTF-8, got UTF-16 or UTF-32",
            hint=f"convert it: `iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}`",
        )
    if b"\x00" in beginning:
        line = beginning[: beginning.index(0)].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: contains zero bytes: not a text file, or damaged",
            hint="JSONL, JSON, CSV and Parquet can be read, each also as .gz",
        )


def _looks_like_utf16(beginning: bytes) -> bool:
    """Whether every other byte is zero, as in UTF-16 of a western script without a BOM."""
    sample = beginning[:64]
    return len(sample) >= 4 and any(sample[i::2].count(0) == len(sample[i::2]) for i in (0, 1)) and any(sample)


def _refuse_other_compression(path: Path, magic: bytes) -> None:
    for mark, name in _OTHER_COMPRESSION.items():
        if magic.startswith(mark):
            raise DataError(f"{path}: is compressed with {name}", hint="unpack it first; only gzip is supported")


def numbered_lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield 1-based numbers and lines, with line ends and blank lines."""
    number = 0
    while True:
        number += 1
        line = _next_line(path, file, number)
        if not line:
            return
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            line = line[len(codecs.BOM_UTF8) :]
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(path, number, error) from error


def _next_line(path: Path, file: BinaryIO, number: int) -> bytes:
    try:
        line = file.readline(MAX_RECORD_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _bad_gzip(f"{path}:{number}", error) from error
    if len(line) > MAX_RECORD_BYTES:
        raise DataError(
            f"{path}:{number}: the line is longer than {MAX_RECORD_BYTES >> 20} MiB",
            hint="write one record per line; check that line ends are not missing",
        )
    return line


def not_utf8(path: Path, number: int, error: UnicodeDecodeError) -> DataError:
    """The error for a byte that is not UTF-8."""
    line_start = error.object.rfind(b"\n", 0, error.start) + 1
    column = len(error.object[line_start : error.start].decode("utf-8", "replace")) + 1
    return DataError(
        f"{path}:{number}: byte 0x{error.object[error.start]:02x} at column {column} is not UTF-8",
        hint=f"if the text is Latin-1: `iconv -f LATIN1 -t UTF-8 {path.name} > utf8-{path.name}`",
    )


def text_chunks(path: Path, file: BinaryIO) -> Iterator[str]:
    """Yield the text in pieces of about a megabyte, without a BOM."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    while True:
        try:
            piece = file.read(CHUNK_BYTES)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise _bad_gzip(f"{path}:{line}", error) from error
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            raise not_utf8(path, line + error.object[: error.start].count(b"\n"), error) from error
        line += text.count("\n")
        if text:
            yield text
        if not piece:
            return
