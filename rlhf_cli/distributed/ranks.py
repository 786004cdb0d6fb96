"""Which of a run's processes this is, from the environment its launcher made; known without torch."""

from __future__ import annotations

import os


def rank() -> int:
    """This process's number among those the launcher started, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes files and speaks to people."""
    return rank() == 0
