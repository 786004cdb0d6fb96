"""Folders of an ensemble of reward models: the first member is in the folder itself, the others are under `members/`.

So whatever reads one reward model reads the first, and `ppo` combines all of them. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

_MEMBERS = "members"
MEMBER_DEPTH = 3
"""Depth of a further member's folder below the run directory, see `policy_adapter.relative_base`."""


def member_folder(folder: Path, number: int) -> Path:
    """Return the folder of a member, counted from 1."""
    return folder if number == 1 else folder / _MEMBERS / str(number)


def further_members(folder: Path) -> list[Path]:
    """Return the folders of all members but the first, in order; empty for a single reward model."""
    found = [path for path in folder.glob(f"{_MEMBERS}/*") if path.name.isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))
