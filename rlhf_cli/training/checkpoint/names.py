"""Names of checkpoint folders, and how far a training is by them. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

STEP, BEST = "step", "best"
"""Kinds of checkpoints: one that training resumes from, and that of the best weights so far."""


def checkpoint_folder(folder: Path, kind: str, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return folder / f"{kind}-{step:08d}"


def checkpoint_folders(folder: Path, kind: str) -> list[Path]:
    """Return the checkpoints of a kind, newest first; other files in the folder are not ours."""
    found = [path for path in folder.glob(f"{kind}-*") if re.fullmatch(rf"{kind}-\d{{8,}}", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint by its folder's name."""
    return int(path.name.rpartition("-")[2])


def steps_done(folder: Path) -> int:
    """Return the number of steps of the newest checkpoint, damaged or not; 0 without one."""
    return max(map(step_of, checkpoint_folders(folder, STEP)), default=0)
