"""Rank and world size of this process, read from the environment that its launcher set. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from rlhf_cli.errors import UsageError

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_HINT = "unset {set_}, or start with torchrun, which sets all of them"


def rank() -> int:
    """Index of this process among those that the launcher started, from 0."""
    return _number("RANK", 0)


def world_size() -> int:
    """Number of processes that the launcher started."""
    return _number("WORLD_SIZE", 1)


def is_main() -> bool:
    """Whether this process writes files and prints messages."""
    return rank() == 0


def check_launcher_environment(environment: Mapping[str, str]) -> None:
    """Refuse an environment that only half describes a launch, in which every process would believe to be alone.

    MASTER_ADDR and MASTER_PORT alone mean nothing: container images set them.

    Raises:
        UsageError: names the variables that are set, and those that are missing or have no usable value.
    """
    given = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in environment]
    if not given or (given == ["WORLD_SIZE"] and environment["WORLD_SIZE"] == "1"):
        return
    shown, hint = " and ".join(f"{name}={environment[name]}" for name in given), _HINT.format(set_=", ".join(given))
    if missing := [name for name in _LAUNCHER_VARIABLES if name not in environment]:
        raise UsageError(f"the environment sets {shown} but not {', '.join(missing)}", hint=hint)
    for name in given:
        if not environment[name].isdecimal():
            raise UsageError(f"the environment variable {name} must be a whole number, got `{environment[name]}`")
    if int(environment["RANK"]) >= int(environment["WORLD_SIZE"]):
        raise UsageError(f"the environment sets {shown}: RANK must be less than WORLD_SIZE", hint=hint)


def _number(name: str, default: int) -> int:
    # Modules ask for the rank while they are imported: a value that is not a number is reported later, by the check.
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
