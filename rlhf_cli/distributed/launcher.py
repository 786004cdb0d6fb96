"""Starts this command in several processes: `--processes`, `--accelerate-config`, or an external launcher.

Imports no torch: only the processes that it starts do (docs/decisions/0006-processes.md).
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from rlhf_cli.distributed.accelerate_settings import check_accelerate_config
from rlhf_cli.distributed.ranks import rank, world_size
from rlhf_cli.distributed.supervisor import supervise
from rlhf_cli.errors import UsageError

ENTRY: tuple[str, ...] = ("-m", "rlhf_cli")
"""Python arguments that start this command."""

TYPED = "RLHF_TYPED"
"""Environment variable with the arguments that the user typed, as a shell reads them, for the record of the run."""

_OPTIONS = ("--processes", "--accelerate-config")


def check_options(processes: int | None, accelerate_config: Path | None) -> None:
    """Refuse options that exclude each other, and a launcher inside a launcher.

    Raises:
        UsageError: names the option.
    """
    if processes is not None and accelerate_config is not None:
        raise UsageError(
            "`--processes` and `--accelerate-config` exclude each other",
            hint="`num_processes` in the configuration sets their number; `--processes` needs no configuration",
        )
    given = "--processes" if processes is not None else "--accelerate-config" if accelerate_config is not None else None
    if given is not None and world_size() > 1:
        raise UsageError(
            f"`{given}` inside a launcher: this is already process {rank()} of {world_size()} (RANK, WORLD_SIZE)",
            hint=f"remove `{given}`, or start the command without the launcher",
        )


def start(processes: int, *, threads: int | None, log: Path) -> None:
    """Run this command in several processes on this machine; raises what `supervise` raises.

    Args:
        processes: number of processes.
        threads: `model.threads`, per process; None divides the machine's cores among the processes.
        log: log of the run.

    Raises:
        UsageError: this system has no process groups, by which the processes are ended together.
    """
    if not hasattr(os, "killpg"):
        raise UsageError(
            f"`--processes` does not work on {platform.system()}, which has no process groups",
            hint="leave it out, or run rlhf under Linux (WSL) or macOS",
        )
    typed = {TYPED: shlex.join(sys.argv[1:])}
    environment = worker_environment({**os.environ, **typed}, processes, threads=threads)
    supervise(worker_command(sys.argv[1:]), processes, environment, log)


def worker_command(arguments: Sequence[str]) -> list[str]:
    """This command with these arguments, without the options that set how it is launched."""
    # The installed command does not look for modules in the current folder; `python -m` would without -P.
    safe = () if Path(sys.argv[0]).name == "__main__.py" else ("-P",)
    return [sys.executable, *safe, *ENTRY, *_without_launch_options(arguments)]


def _without_launch_options(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    is_value = False
    for argument in arguments:
        if is_value:
            is_value = False
        elif argument in _OPTIONS:
            is_value = True
        elif not argument.startswith(tuple(f"{option}=" for option in _OPTIONS)):
            kept.append(argument)
    return kept


def worker_environment(given: Mapping[str, str], processes: int, *, threads: int | None) -> dict[str, str]:
    """Environment of each process on one machine; variables that the user set keep their values."""
    found = dict(given)
    if threads is None:
        found.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    found.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the supervisor reports a process's death, not torch's sockets
    if sys.platform == "linux":
        # All processes are on this machine: none listens to the network, and no host name has to resolve.
        found.setdefault("GLOO_SOCKET_IFNAME", "lo")
        found.setdefault("NCCL_SOCKET_IFNAME", "lo")
    return found


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def exec_accelerate(config: Path) -> NoReturn:
    """Replace this process by accelerate's launcher, which starts this command on one or several machines.

    Raises:
        UsageError: the configuration cannot be read, or asks for a kind of training that is not supported.
    """
    check_accelerate_config(config)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    os.environ[TYPED] = shlex.join(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # No shell and no parent process: signals have to reach the launcher itself.
    os.execv(sys.executable, [sys.executable, *launcher, *ENTRY, *_without_launch_options(sys.argv[1:])])  # noqa: S606
