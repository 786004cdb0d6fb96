"""What to change if a stage does not fit the memory of this machine: each setting, to what, and what it saves.

Each change is made to the recipe, and the same formulas give the memory again. Settings that change speed alone come
first, then those that change the result. Changes that the recipe or its stages refuse are omitted.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from rlhf_cli.errors import UsageError
from rlhf_cli.models.resources import Extent, shards
from rlhf_cli.recipe.overrides import Layers, parse_set
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.base import Stage
from rlhf_cli.stages.sharding import check_sharding


@dataclass(frozen=True)
class Advice:
    """A change of settings.

    Attributes:
        change: such as `ppo.micro_batch_size=4`, as `--set` takes it.
        saved: bytes.
        total: bytes that the stage then needs.
        fits: whether that is within the memory.
        keeps_result: whether the change affects memory and speed only.
        processes: on each machine that the change needs; 0 if it works with any number.
    """

    change: str
    saved: int
    total: int
    fits: bool
    keeps_result: bool
    processes: int = 0


@dataclass(frozen=True)
class _Changed:
    """Settings with one change."""

    change: str
    settings: Any
    recipe: RunSettings
    extent: Extent
    keeps_result: bool = True
    processes: int = 0


def accepted_by(recipe: Recipe, stages: Container[str]) -> Callable[[str], bool]:
    """Return whether a recipe accepts a change, such as `ppo.optimizer=adamw-8bit`.

    Args:
        recipe: as the user wrote it, without what is assumed to plan it.
        stages: names of the stages that run.
    """

    def accepts(change: str) -> bool:
        layers = Layers(recipe.model_dump())
        layers.add(parse_set(change))
        try:
            check_sharding(Recipe.model_validate(layers.data), stages)
        except (ValidationError, UsageError):
            return False
        return True

    return accepts


def advise(
    stage: Stage, settings: Any, recipe: RunSettings, extent: Extent, limit: int, accepts: Callable[[str], bool]
) -> list[Advice]:
    """Return the changes that save memory; one that can take several values has the mildest that fits, else its last.

    Args:
        stage: that does not fit.
        settings: its section.
        recipe: of the run, with its precision.
        extent: of the stage.
        limit: bytes of memory.
        accepts: whether a change is one that the recipe allows, see `accepted_by`.
    """
    before = stage.memory(settings, recipe, extent)
    if before is None:
        return []
    found: dict[str, Advice] = {}
    for changed in _changes(stage, settings, recipe, extent):
        name = changed.change.partition("=")[0]
        if name in found and found[name].fits:
            continue
        need = stage.memory(changed.settings, changed.recipe, changed.extent)
        if need is not None and need.total < before.total and accepts(changed.change):
            saved, fits = before.total - need.total, need.total <= limit
            found[name] = Advice(changed.change, saved, need.total, fits, changed.keeps_result, changed.processes)
    return sorted(found.values(), key=lambda one: (not one.fits, not one.keeps_result))


def _changes(stage: Stage, settings: Any, recipe: RunSettings, extent: Extent) -> Iterator[_Changed]:
    yield from _smaller_batches(stage.section, settings, recipe, extent)
    yield from _other_state(stage.section, settings, recipe, extent)
    model, is_lora = recipe.model, getattr(settings, "adapter", "") == "lora"
    if extent.processes > 1 and shards(model, extent) == 1 and model.quantize == "none":
        sharded = _of_model("model.sharding", {"sharding": "fsdp"}, "fsdp", settings, recipe, extent)
        yield replace(sharded, keeps_result=True, processes=extent.machine or extent.processes)
    if shards(model, extent) > 1 and not extent.on_cpu and not model.sharding_cpu_offload:
        name = "sharding_cpu_offload"
        offloaded = _of_model(f"model.{name}", {name: True}, "true", settings, recipe, extent)
        yield replace(offloaded, keeps_result=True)
    if recipe.checkpoint_async and extent.on_cpu:
        waits = recipe.model_copy(update={"checkpoint_async": False})
        yield _Changed("checkpoint_async=false", settings, waits, extent)
    if model.precision == "float32" and model.dtype != "float32":
        yield _of_model("model.precision", {"precision": "bfloat16"}, "bfloat16", settings, recipe, extent)
    if not extent.on_cpu and model.quantize == "none" and is_lora:
        yield _of_model("model.quantize", {"quantize": "4bit"}, "4bit", settings, recipe, extent)


def _smaller_batches(section: str, settings: Any, recipe: RunSettings, extent: Extent) -> Iterator[_Changed]:
    """Yield settings of memory and speed alone."""
    names = type(settings).model_fields

    def changed(setting: str, value: Any, own: Extent = extent) -> _Changed:
        update = settings.model_copy(update={setting: value})
        return _Changed(f"{section}.{setting}={str(value).lower()}", update, recipe, own)

    if "micro_batch_size" in names and settings.micro_batch_tokens is None:
        for size in _halves(settings.micro_batch_size):
            tokens = extent.tokens and max(1, extent.tokens * size // settings.micro_batch_size)
            yield changed("micro_batch_size", size, replace(extent, tokens=tokens))
    if "gradient_checkpointing" in names and not settings.gradient_checkpointing:
        yield changed("gradient_checkpointing", True)
    if "rollout_batch_size" in names:
        yield from (changed("rollout_batch_size", size) for size in _halves(settings.rollout_batch_size))
    if "sampling" in names:
        for size in _halves(settings.sampling.batch_size):
            smaller = changed("sampling", settings.sampling.model_copy(update={"batch_size": size}))
            yield replace(smaller, change=f"{section}.sampling.batch_size={size}")
    if not extent.on_cpu and getattr(settings, "offload_frozen", True) is False:
        yield changed("offload_frozen", True)


def _other_state(section: str, settings: Any, recipe: RunSettings, extent: Extent) -> Iterator[_Changed]:
    """Yield settings of what is trained and of its optimizer, which change the result."""
    for setting, now, other in (("optimizer", "adamw", "adamw-8bit"), ("adapter", "none", "lora")):
        if getattr(settings, setting, "") == now:
            update = settings.model_copy(update={setting: other})
            yield _Changed(f"{section}.{setting}={other}", update, recipe, extent, keeps_result=False)


def _of_model(
    name: str, update: dict[str, Any], shown: str, settings: Any, recipe: RunSettings, extent: Extent
) -> _Changed:
    changed = recipe.model_copy(update={"model": recipe.model.model_copy(update=update)})
    return _Changed(f"{name}={shown}", settings, changed, extent, keeps_result=False)


def _halves(size: int) -> Iterator[int]:
    while size > 1:
        size //= 2
        yield size
