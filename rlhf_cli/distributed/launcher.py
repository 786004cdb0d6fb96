"""How a command comes to run in several processes: `--processes`, `--accelerate-config`, or a launcher around it.

Torch-free: the processes that are started import it, this one does not (docs/decisions/0006-processes.md).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rlhf_cli.distributed.ranks import rank, world_size
from rlhf_cli.distributed.supervisor import supervise
from rlhf_cli.errors import UsageError

ENTRY: tuple[str, ...] = ("-m", "rlhf_cli")
"""How Python starts this command again."""

_OPTIONS = ("--processes", "--accelerate-config")
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SERVED = ("NO", "MULTI_GPU")


def check_surroundings(processes: int | None, accelerate_config: Path | None) -> None:
    """Refuse what cannot be carried out: a launcher inside a launcher, both at once, half of an environment.

    Raises:
        UsageError: says which.
    """
    given = "--processes" if processes is not None else "--accelerate-config" if accelerate_config is not None else None
    if processes is not None and accelerate_config is not None:
        raise UsageError(
            "`--processes` and `--accelerate-config` exclude each other",
            hint="the configuration's `num_processes` says how many; `--processes` needs no configuration",
        )
    if world_size() == 1:
        return
    if given is not None:
        raise UsageError(
            f"`{given}` inside of a launcher: this is process {rank()} of {world_size()} already (RANK, WORLD_SIZE)",
            hint=f"leave `{given}` out, or the launcher",
        )
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise UsageError(
            f"the environment says WORLD_SIZE={world_size()} and not {', '.join(missing)}",
            hint="start with `--processes N` or torchrun, which set them all, or unset WORLD_SIZE",
        )


def start(processes: int, *, threads: int | None) -> None:
    """Run this command in several processes on this machine; see `supervise` for what it raises.

    Args:
        processes: how many.
        threads: `model.threads`, of each process; None divides the machine's cores.
    """
    supervise(again(sys.argv[1:]), processes, environment(os.environ, processes, threads=threads))


def again(arguments: Sequence[str]) -> list[str]:
    """This command with these arguments, without those that say how it is launched."""
    # The installed command does not look for modules in the current folder; `python -m` would, but for -P.
    safe = () if Path(sys.argv[0]).name == "__main__.py" else ("-P",)
    return [sys.executable, *safe, *ENTRY, *_others(arguments)]


def _others(arguments: Sequence[str]) -> list[str]:
    """Arguments that do not say how the command is launched."""
    kept: list[str] = []
    skipping = False
    for argument in arguments:
        if skipping:
            skipping = False
        elif argument in _OPTIONS:
            skipping = True
        elif not argument.startswith(tuple(f"{option}=" for option in _OPTIONS)):
            kept.append(argument)
    return kept


def environment(given: Mapping[str, str], processes: int, *, threads: int | None) -> dict[str, str]:
    """What the processes on one machine find in their environment; what the user set stays."""
    found = dict(given)
    if threads is None:
        found.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    found.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a peer's death is told by the supervisor, not by its socket
    if sys.platform == "linux":
        # All are on this machine: nothing listens to the network, and no host name has to resolve.
        found.setdefault("GLOO_SOCKET_IFNAME", "lo")
        found.setdefault("NCCL_SOCKET_IFNAME", "lo")
    return found


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hand_over(config: Path) -> NoReturn:
    """Become accelerate's launcher, which starts this command on one machine or on several.

    Raises:
        UsageError: a configuration that cannot be read, or of a kind of training that this command has not.
    """
    check_accelerate_config(config)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    sys.stdout.flush()
    sys.stderr.flush()
    # No shell and no parent: signals are to reach the launcher itself.
    os.execv(sys.executable, [sys.executable, *launcher, *ENTRY, *_others(sys.argv[1:])])  # noqa: S606


def check_accelerate_config(config: Path) -> None:
    """Raise `UsageError` for a configuration of `accelerate config` that this command cannot honor."""
    found = _read(config)
    kind = str(found.get("distributed_type", "NO"))
    count = found.get("num_processes", 1)
    if kind == "MULTI_CPU" or (count != 1 and (kind == "NO" or found.get("use_cpu"))):
        raise UsageError(
            f"{config}: with `distributed_type: {kind}` accelerate starts one process, not {count}, silently",
            hint="use `--processes N` on one machine, or torchrun on several",
        )
    if kind not in _SERVED:
        raise UsageError(
            f"{config}: `distributed_type: {kind}` is none of {', '.join(_SERVED)}; models are not sharded yet",
            hint="every process holds whole models: run `accelerate config` again and choose multi-GPU",
        )
    if str(found.get("compute_environment", "LOCAL_MACHINE")) != "LOCAL_MACHINE":
        raise UsageError(f"{config}: `compute_environment: {found['compute_environment']}` is not LOCAL_MACHINE")
    if str(found.get("mixed_precision", "no")) not in ("no", "None"):
        raise UsageError(
            f"{config}: `mixed_precision: {found['mixed_precision']}` has no effect here",
            hint="set it to 'no', and choose the precision with `--set model.precision=bfloat16`",
        )


def _read(config: Path) -> dict[str, Any]:
    from rlhf_cli.recipe.document import MAX_BYTES, InvalidYAML, parse

    try:
        text = config.read_bytes()[: MAX_BYTES + 1].decode("utf-8-sig")
        value = parse(text).value
    except FileNotFoundError:
        raise UsageError(f"{config}: no such file", hint="`accelerate config` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{config}: cannot be read: {error}") from None
    except InvalidYAML as error:
        raise UsageError(f"{config}:{error.line}: {error.problem}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{config}: is no configuration of accelerate", hint="`accelerate config` writes one")
    return value
