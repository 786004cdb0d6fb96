"""What `model.sharding: fsdp` does not support is refused by name before anything is loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Container, Sequence

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.ranks import local_world_size, world_size
from rlhf_cli.errors import UsageError
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.settings.shared import ModelSettings

_TRAINING = ("sft", "train-rm", "ppo")
SHARDED_STAGES = (*_TRAINING, "label", "best-of-n", "evaluate")
"""Stages that divide the models they load among the processes."""
_OFFLOAD = "`--set ppo.offload_frozen=false --set model.sharding_cpu_offload=true` offloads the parts of all models"
_WHOLE = "`--set model.sharding=none` lets every process hold whole models"


def check_sharding(recipe: RunSettings, stages: Container[str]) -> None:
    """Raise `UsageError` if a stage that will run does not support what the recipe says with `model.sharding`."""
    if recipe.model.sharding == "none":
        return
    found: list[tuple[str, str]] = []
    for name in (name for name in _TRAINING if name in stages):
        setting = f"{name.replace('-', '_')}.optimizer"
        if (optimizer := recipe.value(setting)) not in ("adamw", None):
            found.append((f"{setting}: {optimizer}", "change it"))
    if "ppo" in stages and recipe.value("ppo.offload_frozen"):
        found.append(("ppo.offload_frozen: True", _OFFLOAD))
    if found:
        problem, remedy = found[0]
        raise UsageError(f"`model.sharding: fsdp` does not support `{problem}`", hint=f"{remedy}, or {_WHOLE}")


def described_processes(model: ModelSettings, count: int) -> str | None:
    """Return how `count` processes share a run, in one line; None if there is only one."""
    if count == 1:
        return None
    if model.sharding == "none":
        return f"{count} processes share the work, each with whole models"
    size = sharding_size(model) or count
    groups = "" if size == count else f", in groups of {size}"
    return f"{count} processes share the work; they also divide the models{groups} (`model.sharding: fsdp`)"


def sharding_size(model: ModelSettings) -> int | None:
    """Return how many processes divide a model among themselves; None is all of them."""
    return local_world_size() if model.sharding_size == "machine" else model.sharding_size


def check_processes(recipe: RunSettings, stages: Container[str]) -> None:
    """Raise `UsageError` if a stage that will run shards models, and what this process sees does not allow it."""
    if any(recipe.value(f"{name.replace('-', '_')}.divides_model") for name in SHARDED_STAGES if name in stages):
        _check_processes(recipe.model, [local_world_size()])


def require_processes(recipe: RunSettings) -> None:
    """Raise `UsageError` if models should be sharded, and the processes or their devices do not allow it.

    With `model.sharding_size: machine` every process calls this.
    """
    is_exchanged = recipe.model.sharding_size == "machine"
    _check_processes(
        recipe.model, ProcessGroup().all_gather_object(local_world_size()) if is_exchanged else [local_world_size()]
    )


def _check_processes(model: ModelSettings, sizes: Sequence[int | None]) -> None:
    """Refuse processes; `sizes` are the known numbers of processes on a machine, None where the launcher tells none."""
    count = world_size()
    if model.sharding == "none":
        return
    check_several(model, count, "start several with `--processes N`")
    _check_size(model, count, sizes)
    if model.sharding_cpu_offload:
        from rlhf_cli.models.device import resolve_device

        if (device := resolve_device(model.device).type) == "cpu":
            raise UsageError(
                f"`model.sharding_cpu_offload` has no effect on the device `{device}`: its weights are in host memory",
                hint="run on GPUs, or use `--set model.sharding_cpu_offload=false`",
            )


def check_several(model: ModelSettings, count: int, remedy: str) -> None:
    """Raise `UsageError` if models should be sharded, and `count` processes are only one.

    Args:
        model: section `model`.
        count: processes of the run.
        remedy: how to have several, for the hint.
    """
    if model.sharding != "none" and count == 1:
        raise UsageError(
            f"`model.sharding: {model.sharding}` divides a model among several processes, but there is only one",
            hint=f"{remedy}, or leave the model whole with `--set model.sharding=none`",
        )


def _check_size(model: ModelSettings, count: int, sizes: Sequence[int | None]) -> None:
    """Refuse groups that `count` processes do not make up."""
    if model.sharding_size == "machine" and (None in sizes or len(set(sizes)) > 1):
        told = ", ".join(sorted({"unknown" if size is None else str(size) for size in sizes}))
        raise UsageError(
            "`model.sharding_size: machine` needs a launcher that sets LOCAL_WORLD_SIZE, to the same number on "
            f"every machine; it is {told}",
            hint="start with torchrun or `--processes N`, or give `model.sharding_size` as a number",
        )
    check_groups(model, count, local_world_size())


def check_groups(model: ModelSettings, count: int, of_machine: int | None) -> None:
    """Raise `UsageError` if `count` processes cannot be divided into the groups of `model.sharding_size`.

    Args:
        model: section `model`.
        count: processes of the run.
        of_machine: processes on each machine.
    """
    size = of_machine if model.sharding_size == "machine" else model.sharding_size
    if model.sharding == "none" or size is None:
        return
    if size == 1:
        raise UsageError(
            "`model.sharding_size: machine` divides a model among the processes of a machine, and each has one",
            hint="start several on each machine, or give `model.sharding_size` as a number, or leave it out",
        )
    if count % size:
        raise UsageError(
            f"`model.sharding_size: {model.sharding_size}` makes groups of {size} processes, and {count} processes "
            "cannot be divided into such groups",
            hint=f"give a number that divides {count}, or leave it out",
        )
