"""A file of one JSON object per step, which a resumed run continues where its checkpoint left off.

A checkpoint holds a position: the number of bytes that were durable when it was written, and their SHA-256. With it, a
resumed run keeps exactly the lines it had. If the file was damaged meanwhile, unreadable lines are lost and the run
continues: nothing in the file affects training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf_cli.files import fsync, write_whole
from rlhf_cli.progress import warn

_LINE_ENDS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}
"""JSON escapes of characters that some readers treat as line ends."""
_LINE_END = b"}\n"
"""The end of a line; values that `amend` adds stand before it."""


class StepLines:
    """Appends JSON lines, each with a `step`.

    Args:
        path: the file; created if it is missing.
        after_step: lines of later steps are dropped, because those steps run again.
        position: what `position` returned when the step to resume from was saved; everything written later is dropped.
            None where nothing was saved; then `after_step` alone decides.
        sparse: whether only some steps have lines, and a step may have several.

    Attributes:
        last_step: last step with a line in the file, before any line was dropped; -1 without lines.
        kept_step: last step with a line that stays; -1 without lines.
    """

    def __init__(
        self, path: Path, *, after_step: int = 0, position: Mapping[str, Any] | None = None, sparse: bool = False
    ) -> None:
        self._path, self._sparse = path, sparse
        found = path.read_bytes() if path.exists() else b""
        self.last_step = _last_step(found)
        kept = None if position is None else _saved(found, position)
        if kept is None:
            kept = self._readable(found, after_step, position)
        self.kept_step = _last_step(kept)
        if kept != found or not path.exists():
            write_whole(path, kept)
        self._open(kept)

    def _open(self, content: bytes) -> None:
        """Append to the file, which has this content."""
        self._digest, self._bytes = hashlib.sha256(content), len(content)
        self._file = self._path.open("ab")

    def _readable(self, found: bytes, after_step: int, position: Mapping[str, Any] | None) -> bytes:
        """Return the readable lines of steps up to `after_step`, in the order of their steps."""
        kept: list[bytes] = []
        last, lost = -1, 0
        for line, step in _numbered(found):
            if step is None or step < last + (not self._sparse):
                lost += 1
            elif step <= after_step:
                kept.append(line)
                last = step
        stays = f"{len(kept):,} readable line{'' if len(kept) == 1 else 's'} of steps up to {after_step:,} are kept"
        if not self._path.exists():
            if position is not None or (after_step > 0 and not self._sparse):
                warn(f"{self._path} is missing: its lines of steps up to {after_step:,} are lost")
        elif position is not None:
            what = "is shorter than" if len(found) < position["bytes"] else "differs from what it was"
            warn(f"{self._path} {what} when step {after_step:,} was saved: {stays}")
        elif lost:
            warn(f"{self._path}: {lost:,} line{'' if lost == 1 else 's'} cannot be read: {stays}")
        return b"".join(kept)

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Write a line per row, all at once; raises `OSError` where the disk cannot be written."""
        lines = b"".join(map(_line, rows))
        self._file.write(lines)
        self._file.flush()
        self._digest.update(lines)
        self._bytes += len(lines)

    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        """Add values to the last line if it is of `step`, otherwise add a line. The file is replaced atomically.

        Raises:
            OSError: the disk cannot be written; the file is unchanged.
        """
        self.close()
        lines = list(_numbered(self._path.read_bytes())) if self._path.exists() else []
        row: dict[str, Any] = {"step": step}
        if lines and lines[-1][1] == step:
            row = json.loads(lines.pop()[0])
        content = b"".join(line for line, _ in lines) + _line(row | dict(values))
        write_whole(self._path, content)
        self._open(content)

    def position(self) -> dict[str, Any]:
        """Make what was written durable and return how far it goes, for a checkpoint: `bytes` and their `sha256`."""
        self.sync()
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def sync(self) -> None:
        """Make what was written durable."""
        fsync(self._file)

    def close(self) -> None:
        """Make what was written durable and close the file; a second call does nothing."""
        if not self._file.closed:
            self.sync()
            self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of such a file; unreadable lines are skipped, and a missing file has no rows."""
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        return []
    return readable_rows(found)


def readable_rows(data: bytes) -> list[dict[str, Any]]:
    """Return the rows of a part of such a file; unreadable lines are skipped."""
    return [json.loads(line) for line, step in _numbered(data) if step is not None]


def _numbered(data: bytes) -> Iterable[tuple[bytes, int | None]]:
    """Yield lines with their steps, None for an unreadable line. What follows the last line end was torn by a kill."""
    for line in data.split(b"\n")[:-1]:
        if line:
            yield line + b"\n", _step_of(line)


def _line(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(row, ensure_ascii=False, allow_nan=False).translate(_LINE_ENDS)
    return text.encode("utf-8", "replace") + b"\n"


def _last_step(data: bytes) -> int:
    return max((step for _, step in _numbered(data) if step is not None), default=-1)


def _step_of(line: bytes) -> int | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def _saved(found: bytes, position: Mapping[str, Any]) -> bytes | None:
    """Return the bytes that a checkpoint knows; None if the file no longer begins with them.

    If the run was killed between `amend` and the checkpoint after it, the last line has values that are measured again:
    it ends without them.
    """
    beginning = found[: position["bytes"]]
    for content in (beginning, beginning[: -len(_LINE_END)] + _LINE_END):
        if len(content) == position["bytes"] and hashlib.sha256(content).hexdigest() == position["sha256"]:
            return content
    return None
