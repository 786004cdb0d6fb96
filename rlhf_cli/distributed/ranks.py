"""Rank and world size of this process, read from the environment that its launcher set. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from rlhf_cli.distributed.accelerate_settings import check_accelerate_environment
from rlhf_cli.errors import UsageError

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_MAX_DIGITS = 9
_MAX_PORT = 65_535

# (size, rank) of launchers that start several processes without RANK and WORLD_SIZE: Open MPI, MPICH and Intel MPI,
# MVAPICH, srun. SLURM_NTASKS is not among them: the batch script of a job has it too, and is one process.
_OTHER_LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


def rank() -> int:
    """Index of this process among those that the launcher started, from 0."""
    return _number("RANK", 0)


def world_size() -> int:
    """Number of processes that the launcher started."""
    return _number("WORLD_SIZE", 1)


def local_world_size() -> int | None:
    """Number of processes that the launcher started on this machine; None if it does not say."""
    return _number("LOCAL_WORLD_SIZE", 0) or None


def is_main() -> bool:
    """Whether this process writes files and prints messages."""
    return rank() == 0


def check_launcher_environment(environment: Mapping[str, str]) -> None:
    """Refuse an environment that only half describes a launch, in which every process would believe to be alone.

    Settings of accelerate's launcher without effect are refused too. MASTER_ADDR and MASTER_PORT alone mean nothing:
    container images set them.

    Raises:
        UsageError: names the variables that are set, and those that are missing or have no usable value.
    """
    check_accelerate_environment(environment)
    given = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in environment]
    if not given or (given == ["WORLD_SIZE"] and environment["WORLD_SIZE"] == "1"):
        _check_other_launchers(environment)
        return
    shown = " and ".join(f"{name}={environment[name]}" for name in given)
    hint = f"unset {', '.join(given)}, or start with torchrun, which sets all of them"
    if missing := [name for name in _LAUNCHER_VARIABLES if name not in environment]:
        raise UsageError(f"the environment sets {shown} but not {', '.join(missing)}", hint=hint)
    if problem := _rank_problem(environment):
        raise UsageError(problem, hint=hint)
    if found := _address_problem(environment):
        name, problem = found
        hint = f"set {name} to the same value in all processes, or start with torchrun, which sets it"
        raise UsageError(f"the environment variable {name} {problem}", hint=hint)


def _rank_problem(environment: Mapping[str, str]) -> str | None:
    """Return what is wrong with ranks and sizes, none of which is missing; None if nothing is."""
    for name in _NUMBERS:
        if name in environment and not _is_number(environment[name]):
            return f"the environment variable {name} {_not_a_number(environment[name])}"
    found = {name: int(environment[name]) for name in _NUMBERS if name in environment}
    for one, other in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if other in found and found[one] >= found[other]:
            return (
                f"the environment sets {one}={found[one]} and {other}={found[other]}: {one} must be less than {other}"
            )
    if found.get("LOCAL_WORLD_SIZE", 1) > found["WORLD_SIZE"]:
        return (
            f"the environment sets LOCAL_WORLD_SIZE={found['LOCAL_WORLD_SIZE']} and WORLD_SIZE={found['WORLD_SIZE']}: "
            "LOCAL_WORLD_SIZE must be at most WORLD_SIZE"
        )
    return None


def _address_problem(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the variable of the common address that is unusable and what is wrong with it; None if neither is."""
    port = environment["MASTER_PORT"]
    if not _is_number(port):
        return "MASTER_PORT", _not_a_number(port)
    if not 1 <= int(port) <= _MAX_PORT:
        return "MASTER_PORT", f"must be from 1 to {_MAX_PORT}, got {port}"
    if not environment["MASTER_ADDR"].strip():
        return "MASTER_ADDR", "is empty; it must name the machine of rank 0"
    return None


def _check_other_launchers(environment: Mapping[str, str]) -> None:
    """Refuse several processes that another launcher started: each would do the whole work."""
    for size, index in _OTHER_LAUNCHERS:
        count = environment.get(size, "")
        if _is_number(count) and int(count) > 1:
            raise UsageError(
                f"this is one of {count} processes ({size}={count}, {index}={environment.get(index, '')}), but the "
                f"environment does not set {', '.join(_LAUNCHER_VARIABLES)}",
                hint="start one process per machine, with torchrun or `rlhf --processes N` in it, or set these "
                f"variables in each process; to work alone, unset {size}",
            )


def _not_a_number(text: str) -> str:
    return f"must be a whole number, got `{text}`"


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= _MAX_DIGITS


def _number(name: str, default: int) -> int:
    # Modules ask for the rank while they are imported: a value that is not a number is reported later, by the check.
    text = os.environ.get(name, "")
    return int(text) if _is_number(text) else default
