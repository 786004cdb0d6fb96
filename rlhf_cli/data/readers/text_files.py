"""Reads files as numbered lines: detects gzip by its magic bytes, UTF-16 and UTF-32, and lines that end in CR."""

from __future__ import annotations

import codecs
import gzip
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rlhf_cli.errors import DataError

MAX_RECORD_BYTES = 64 * 1024 * 1024
"""Longest line or record, so that a file without line ends does not fill the memory."""

CHUNK_BYTES = 1 << 20
_WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order mark -> encoding; that of UTF-32 begins as that of UTF-16."""
WINDOWS = "cp1252"
_OTHER_COMPRESSION = {b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}


@contextmanager
def opened_text(path: Path) -> Iterator[BinaryIO]:
    """Open a text file as UTF-8 with LF or CRLF; another form is rewritten into a temporary file first."""
    with opened(path) as file:
        beginning = file.read(4096)
        file.seek(0)
        encoding = _wide_encoding(beginning)
        ends_in_cr = encoding is None and _ends_in_cr(beginning)
        if encoding is None and not ends_in_cr:
            yield file
            return
        with tempfile.TemporaryFile() as copy:
            try:
                for piece in _decoded(file, encoding):
                    copy.write(piece.replace("\r", "\n").encode() if ends_in_cr else piece.encode())
            except UnicodeError as error:
                name = encoding or "UTF-8"
                raise DataError(f"{path}: is not {name} throughout: {error}", hint="save it as UTF-8") from error
            copy.seek(0)
            yield copy  # type: ignore[misc]


def _decoded(file: BinaryIO, encoding: str | None) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding or "utf-8")()
    while piece := file.read(CHUNK_BYTES):
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)


def _wide_encoding(beginning: bytes) -> str | None:
    """UTF-16 or UTF-32, by its mark or by the zero bytes of western text; None for encodings of single bytes."""
    for mark, encoding in _WIDE_MARKS.items():
        if beginning.startswith(mark):
            return encoding
    sample = beginning[: min(256, len(beginning) // 4 * 4)]
    if len(sample) < 8:
        return None
    zero = [sample[offset::4].count(0) > 0.8 * len(sample) / 4 for offset in range(4)]
    patterns = {(False, True, True, True): "utf-32-le", (True, True, True, False): "utf-32-be"}
    patterns |= {(False, True, False, True): "utf-16-le", (True, False, True, False): "utf-16-be"}
    return patterns.get(tuple(zero))  # type: ignore[arg-type]


def _ends_in_cr(beginning: bytes) -> bool:
    """Whether the first line ends in a bare CR, as old programs write and some still do."""
    at = beginning.find(b"\r")
    return 0 <= at < len(beginning) - 1 and beginning[at + 1] != 0x0A and b"\n" not in beginning[:at]


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


def refuse_other_files(path: Path, beginning: bytes) -> None:
    """Raise `DataError` if the first bytes are those of a Git LFS pointer or of a web page."""
    if beginning.startswith(b"version https://git-lfs.github.com/spec/"):
        raise DataError(
            f"{path}: is a Git LFS pointer, not the data itself",
            hint=f"fetch the data: `git lfs pull --include {path.name}` in its repository",
        )
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+html|html|head)\b", beginning, re.IGNORECASE):
        raise DataError(
            f"{path}: is a web page (HTML), not data",
            hint="the download needed a login or another address: open the file in a browser to see what it says",
        )


def refuse_zero_bytes(path: Path, beginning: bytes) -> None:
    """Raise `DataError` if the first bytes are not text."""
    if b"\x00" in beginning and _wide_encoding(beginning) is None:
        line = beginning[: beginning.index(0)].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: contains zero bytes: not a text file, or damaged",
            hint="JSONL, JSON, CSV, TSV, XLSX, TXT and Parquet can be read, each also as .gz",
        )


def _refuse_other_compression(path: Path, magic: bytes) -> None:
    for mark, name in _OTHER_COMPRESSION.items():
        if magic.startswith(mark):
            spreadsheet = "; a spreadsheet must be named .xlsx" if name == "zip" else ""
            raise DataError(
                f"{path}: is compressed with {name}", hint=f"unpack it first; only gzip is supported{spreadsheet}"
            )


class LineDecoder:
    """Decodes lines as UTF-8, or as Windows-1252 if that is allowed and the first line beyond ASCII is not UTF-8.

    Attributes:
        encoding: of the lines so far.
    """

    def __init__(self, *, allows_windows: bool = False) -> None:
        self.encoding = "utf-8"
        self._is_decided = not allows_windows

    def decode(self, line: bytes) -> str:
        """Decode a line; raises `UnicodeDecodeError`."""
        if line.isascii():
            return line.decode("ascii")
        if not self._is_decided:
            self._is_decided = True
            try:
                return line.decode("utf-8")
            except UnicodeDecodeError:
                self.encoding = WINDOWS
        return line.decode(self.encoding)


def numbered_lines(path: Path, file: BinaryIO, decoder: LineDecoder | None = None) -> Iterator[tuple[int, str]]:
    """Yield 1-based numbers and lines, with line ends and blank lines."""
    decoder = decoder or LineDecoder()
    number = 0
    while True:
        number += 1
        line = _next_line(path, file, number)
        if not line:
            return
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            line = line[len(codecs.BOM_UTF8) :]
        try:
            yield number, decoder.decode(line)
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
    is_windows = error.encoding in (WINDOWS, "charmap")
    return DataError(
        f"{path}:{number}: byte 0x{error.object[error.start]:02x} at column {column} is not "
        f"{'Windows-1252, and the file is not UTF-8 either' if is_windows else 'UTF-8'}",
        hint="save the file as UTF-8 with the program that wrote it"
        if is_windows
        else f"if it was written on Windows: `iconv -f CP1252 -t UTF-8 {path.name} > utf8-{path.name}`",
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
