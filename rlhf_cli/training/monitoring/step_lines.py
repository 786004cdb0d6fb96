"""A file of one JSON object a step, that a killed run goes on writing where its checkpoint left off.

A checkpoint keeps a position: how many bytes were durable when it was written, and their SHA-256. With it a resumed
run finds exactly the lines it had. A file that was damaged meanwhile costs the lines that cannot be read, and never the
run: what is in it steers nothing.
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
"""Characters that some readers end a line at, as JSON escapes them."""


class StepLines:
    """Appends JSON lines, each with a `step`.

    Args:
        path: the file; made where it is missing.
        after_step: lines of later steps are dropped, since those steps are done again.
        position: what `position` gave when the step that training goes on behind was saved; all that was written
            later is dropped. None where nothing was kept: then `after_step` alone decides.
        sparse: whether only some steps have lines, maybe several.

    Attributes:
        last_step: the last step that the file had a line of before any was dropped; -1 if it had none.
        kept_step: the same of the lines that stay.
    """

    def __init__(
        self, path: Path, *, after_step: int = 0, position: Mapping[str, Any] | None = None, sparse: bool = False
    ) -> None:
        self._path, self._sparse = path, sparse
        found = path.read_bytes() if path.exists() else b""
        self.last_step = _last_step(found)
        if position is not None and _is_whole(found, position):
            kept = found[: position["bytes"]]
        else:
            kept = self._readable(found, after_step, position)
        self.kept_step = _last_step(kept)
        if kept != found or not path.exists():
            write_whole(path, kept)
        self._digest, self._bytes = hashlib.sha256(kept), len(kept)
        self._file = path.open("ab")

    def _readable(self, found: bytes, after_step: int, position: Mapping[str, Any] | None) -> bytes:
        """Lines of steps up to `after_step` that can be read, in the order of their steps."""
        kept: list[bytes] = []
        last, lost = -1, 0
        for line, step in _numbered(found):
            if step is None or step < last + (not self._sparse):
                lost += 1
            elif step <= after_step:
                kept.append(line)
                last = step
        stays = f"{len(kept):,} line{'' if len(kept) == 1 else 's'} of steps up to {after_step:,} can be read and stay"
        if not self._path.exists():
            if position is not None or (after_step > 0 and not self._sparse):
                warn(f"{self._path} is missing: what it said of steps up to {after_step:,} is lost")
        elif position is not None:
            what = "is shorter than" if len(found) < position["bytes"] else "is not as"
            warn(f"{self._path} {what} when step {after_step:,} was saved: {stays}")
        elif lost:
            warn(f"{self._path}: {lost:,} line{'' if lost == 1 else 's'} cannot be read: {stays}")
        return b"".join(kept)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line. Raises `OSError` where the disk does not take it."""
        text = json.dumps(row, ensure_ascii=False, allow_nan=False).translate(_LINE_ENDS)
        line = text.encode("utf-8", "replace") + b"\n"
        self._file.write(line)
        self._file.flush()
        self._digest.update(line)
        self._bytes += len(line)

    def position(self) -> dict[str, Any]:
        """Make what was written durable and say how far it goes, for a checkpoint: `bytes` and their `sha256`."""
        self.sync()
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def sync(self) -> None:
        """Make what was written durable."""
        fsync(self._file)

    def close(self) -> None:
        """Make what was written durable, and close the file; a second time does nothing."""
        if not self._file.closed:
            self.sync()
            self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file; lines that cannot be read are left out, and a missing file has none."""
    found = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line, step in _numbered(found) if step is not None]


def _numbered(data: bytes) -> Iterable[tuple[bytes, int | None]]:
    """Lines with their steps, None for one that cannot be read. What follows the last line end was torn by a kill."""
    for line in data.split(b"\n")[:-1]:
        if line:
            yield line + b"\n", _step_of(line)


def _last_step(data: bytes) -> int:
    return max((step for _, step in _numbered(data) if step is not None), default=-1)


def _step_of(line: bytes) -> int | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def _is_whole(found: bytes, position: Mapping[str, Any]) -> bool:
    """Whether the file still begins with the bytes a checkpoint knew."""
    beginning = found[: position["bytes"]]
    return len(beginning) == position["bytes"] and hashlib.sha256(beginning).hexdigest() == position["sha256"]
