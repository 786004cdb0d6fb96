"""What `model.sharding: fsdp` does not support is refused by name before anything is loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Container

from rlhf_cli.distributed.ranks import world_size
from rlhf_cli.errors import UsageError
from rlhf_cli.settings.run import RunSettings

_TRAINING = ("sft", "train-rm", "ppo")
_WHOLE = "`--set model.sharding=none` lets every process hold whole models"


def check_sharding(recipe: RunSettings, stages: Container[str]) -> None:
    """Raise `UsageError` if a stage that will run does not support what the recipe says with `model.sharding`."""
    if recipe.model.sharding == "none":
        return
    found = []
    for name in (name for name in _TRAINING if name in stages):
        setting = f"{name.replace('-', '_')}.optimizer"
        if (optimizer := recipe.value(setting)) not in ("adamw", None):
            found.append(f"{setting}: {optimizer}")
    if "ppo" in stages and recipe.value("ppo") is not None:
        found += _unsupported_by_ppo(recipe)
    if found:
        raise UsageError(f"`model.sharding: fsdp` does not support `{found[0]}`", hint=f"change it, or {_WHOLE}")


def _unsupported_by_ppo(recipe: RunSettings) -> list[str]:
    """Return settings of PPO that sharded models do not support."""
    critic, start = recipe.value("ppo.critic"), recipe.value("ppo.critic_from")
    found = [f"ppo.{name}: {recipe.value(f'ppo.{name}')}" for name in ("save_steps", "offload_frozen")
             if recipe.value(f"ppo.{name}")]  # fmt: skip
    if recipe.generation.engine == "vllm":
        found.append("generation.engine: vllm")
    if critic == "head":
        found.append("ppo.critic: head")
    is_separate = critic == "separate" or recipe.value("ppo.adapter") == "none"
    if is_separate and start != "policy":
        found.append(
            f"ppo.critic_from: {start}` with a critic that is a model of its own; set `ppo.critic_from: policy"
        )
    return found


def require_processes(recipe: RunSettings) -> None:
    """Raise `UsageError` if models should be sharded, and there is one process."""
    if recipe.model.sharding != "none" and world_size() == 1:
        raise UsageError(
            f"`model.sharding: {recipe.model.sharding}` divides a model among several processes, but there is only one",
            hint="start several with `--processes N`, or leave the model whole with `--set model.sharding=none`",
        )
