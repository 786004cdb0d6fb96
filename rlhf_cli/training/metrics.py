"""Metrics as they are made: one JSON object a line, under TRL's names where TRL has one."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path


class MetricsLog:
    """Appends to a `metrics.jsonl`; a resumed run goes on behind the step it resumes from.

    Args:
        path: the file.
        after_step: lines of later steps are dropped, since those steps will be done again.
    """

    def __init__(self, path: Path, *, after_step: int = 0) -> None:
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= after_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line; figures that are not finite are written as null, since JSON has no NaN."""
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make what was written durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Make what was written durable, and close the file."""
        self.sync()
        self._file.close()


def _whole_lines(path: Path) -> list[str]:
    """Lines that end in a newline: a kill can tear the last."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]
