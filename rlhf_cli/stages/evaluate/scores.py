"""Scores of completions on disk, appended in chunks: a kill loses one chunk, and the next attempt reads the others."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DiskError
from rlhf_cli.files import append
from rlhf_cli.progress import warn


class ScoreFile:
    """What was computed of numbered rows; rank 0 reads and writes it for all processes.

    Args:
        path: the file, which may hold chunks of an earlier attempt.
        processes: of the run.
    """

    def __init__(self, path: Path, processes: ProcessGroup) -> None:
        self._path, self._processes = path, processes

    def fill(
        self,
        count: int,
        score: Callable[[list[int]], list[Any]],
        *,
        chunk: int,
        before_chunk: Callable[[], object] = lambda: None,
    ) -> list[Any]:
        """Return one result per row; those that the file lacks are computed, and on disk before the next begin.

        Args:
            count: number of rows.
            score: takes row numbers and returns as many results that JSON can hold; every process calls it.
            chunk: rows per call of `score`.
            before_chunk: called when everything so far is on disk; may raise to stop.

        Raises:
            DiskError: the disk is full; earlier chunks are kept.
        """
        found = self._found
        missing = [row for row in range(count) if row not in found]
        for start in range(0, len(missing), chunk):
            before_chunk()
            rows = missing[start : start + chunk]
            results = score(rows)
            if self._processes.is_main:
                self._append(rows, results)
            found.update(zip(rows, results, strict=True))
        return [found[row] for row in range(count)]

    def lacks(self, count: int) -> int:
        """Return how many of the rows below `count` are not stored; every process gets the same number."""
        return len(set(range(count)) - self._found.keys())

    @cached_property
    def _found(self) -> dict[int, Any]:
        """Results by row; rank 0 reads the file once, when all processes first ask."""
        mine = self._stored() if self._processes.is_main else None
        return dict(self._processes.all_gather_object(mine)[0])

    def _stored(self) -> list[tuple[int, Any]]:
        """Return (row, result) of all whole lines, and cut off what is torn or damaged."""
        found: list[tuple[int, Any]] = []
        if not self._path.is_file():
            return found
        content, size = self._path.read_bytes(), 0
        for line in content.splitlines(keepends=True):
            pairs = _parse(line)
            if pairs is None:
                break
            found += pairs
            size += len(line)
        if torn := len(content) - size:
            warn(f"the last {torn:,} bytes of {self._path} are torn or damaged: those scores are computed again")
            with self._path.open("ab") as file:
                file.truncate(size)
        return found

    def _append(self, rows: Sequence[int], results: Sequence[Any]) -> None:
        plain = {"rows": list(rows), "results": list(results)}
        line = json.dumps(plain | {"crc32": _crc32(plain)}).encode() + b"\n"
        try:
            append(self._path, line)
        except OSError as error:
            raise DiskError(
                f"cannot write {len(line):,} bytes to {self._path}: {error.strerror or error}",
                hint="free some space and run the same command again; scores computed before are kept",
            ) from error


def share_of_chunks(processes: ProcessGroup, count: int, chunk: int) -> int:
    """Return how many of `count` rows this process computes, where the processes share each chunk."""
    starts = range(0, count, chunk)
    return sum(len(processes.shard(range(start, min(start + chunk, count)))) for start in starts)


def _parse(line: bytes) -> list[tuple[int, Any]] | None:
    """Return (row, result) of a line; None if it is torn or damaged."""
    try:
        plain = json.loads(line)
        if not line.endswith(b"\n") or plain.pop("crc32") != _crc32(plain):
            return None
        return list(zip(plain["rows"], plain["results"], strict=True))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _crc32(plain: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())
