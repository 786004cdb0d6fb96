"""What to change if a stage does not fit the memory of this machine: each setting, to what, and what it saves.

Each change is made to the recipe, and the same formulas give the memory again. Settings that change speed alone come
first, then those that change the result. Changes that the recipe or its stages refuse are omitted. Where none is enough
by itself, all combinations are tried. Other ways to draw completions are named only where the stage fits with them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from rlhf_cli.errors import UsageError
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.tensor_parallel import indivisible
from rlhf_cli.models.resources import Extent, shards, vllm_least
from rlhf_cli.pipeline.prediction import SERVER_SHARE
from rlhf_cli.recipe.overrides import Layers, parse_set
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.settings.shared import GenerationSettings
from rlhf_cli.stages.base import Stage
from rlhf_cli.stages.sharding import check_sharding

SERVER = "http://HOST:8000"
"""Address of a vLLM server that is only proposed."""


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
        server_gpus: least GPUs of a vLLM server that the change needs.
    """

    change: str
    saved: int
    total: int
    fits: bool
    keeps_result: bool
    processes: int = 0
    server_gpus: int = 0


@dataclass(frozen=True)
class _Changed:
    """Settings with one change."""

    change: str
    settings: Any
    recipe: RunSettings
    extent: Extent
    keeps_result: bool = True
    processes: int = 0
    server_gpus: int = 0

    @property
    def name(self) -> str:
        """The setting that is changed."""
        return self.change.partition("=")[0]

    def advice(self, before: int, total: int, limit: int) -> Advice:
        """Return the advice, for the memory without and with the change."""
        return Advice(
            self.change, before - total, total, total <= limit, self.keeps_result, self.processes, self.server_gpus
        )


Accepts = Callable[..., bool]
"""Whether the recipe accepts changes, each such as `ppo.optimizer=adamw-8bit`, all together."""


def accepted_by(recipe: Recipe, stages: Container[str]) -> Accepts:
    """Return what tells whether a recipe accepts changes.

    Args:
        recipe: as the user wrote it, without what is assumed to plan it.
        stages: names of the stages that run.
    """

    def accepts(*changes: str) -> bool:
        layers = Layers(recipe.model_dump())
        for change in changes:
            layers.add(parse_set(change))
        try:
            check_sharding(Recipe.model_validate(layers.data), stages)
        except (ValidationError, UsageError):
            return False
        return True

    return accepts


def advise(
    stage: Stage, settings: Any, recipe: RunSettings, extent: Extent, limit: int, accepts: Accepts
) -> tuple[list[Advice], list[Advice]]:
    """Return the changes that save memory; one that can take several values has the mildest that fits, else its last.

    The second list is the smallest combination that fits, if no change fits by itself: each with what it saves after
    those before it. It is empty if none fits.

    Args:
        stage: that does not fit.
        settings: its section.
        recipe: of the run, with its precision.
        extent: of the stage.
        limit: bytes of memory.
        accepts: see `accepted_by`.
    """
    before = stage.memory(settings, recipe, extent)
    if before is None:
        return [], []
    found: dict[str, Advice] = {}
    start = _Changed("", settings, recipe, extent)
    for changed in _changes(stage, start):
        if changed.name in found and found[changed.name].fits:
            continue
        total = _total(stage, changed)
        if total < before.total and accepts(changed.change):
            found[changed.name] = changed.advice(before.total, total, limit)
    for others in _other_drawing(stage, start):
        fitting = (one for one in others if _total(stage, one) <= limit and accepts(one.change))
        if (one := next(fitting, None)) is not None:
            found[one.change] = one.advice(before.total, _total(stage, one), limit)
    advice = sorted(found.values(), key=lambda one: (not one.fits, not one.keeps_result))
    fits = any(one.fits for one in advice)
    return advice, [] if fits else _combined(stage, start, before.total, limit, accepts)


def _total(stage: Stage, changed: _Changed) -> int:
    need = stage.memory(changed.settings, changed.recipe, changed.extent)
    assert need is not None  # as without the change
    return need.total


def _combined(stage: Stage, start: _Changed, before: int, limit: int, accepts: Accepts) -> list[Advice]:
    """Return the combination of fewest changes that fits, first of those that keep the result.

    Each setting has its last value. What draws completions comes last, since it counts only where the stage then fits.
    """
    seen: set[frozenset[str]] = set()
    level: list[tuple[_Changed, ...]] = [()]
    while level:
        longer: list[tuple[_Changed, ...]] = []
        fitting: list[tuple[_Changed, ...]] = []
        for path in level:
            state = path[-1] if path else start
            for others in _other_drawing(stage, state):
                fitting += [(*path, one) for one in others if _total(stage, one) <= limit][:1]
            for changed in {one.name: one for one in _changes(stage, state)}.values():
                names = frozenset([changed.name, *(one.name for one in path)])
                if names in seen:
                    continue
                seen.add(names)
                longer.append((*path, changed))
        fitting += [path for path in longer if _total(stage, path[-1]) <= limit]
        for path in sorted(fitting, key=lambda path: (len(path), sum(not one.keeps_result for one in path))):
            if accepts(*(one.change for one in path)):
                totals = [before, *(_total(stage, one) for one in path)]
                return [one.advice(was, now, limit) for one, was, now in zip(path, totals, totals[1:], strict=False)]
        level = longer
    return []


def _changes(stage: Stage, state: _Changed) -> Iterator[_Changed]:
    settings, recipe, extent = state.settings, state.recipe, state.extent
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


def _other_drawing(stage: Stage, state: _Changed) -> Iterator[Iterator[_Changed]]:
    """Yield other ways to draw completions, each with the values to try in turn.

    vLLM divides the policy among GPUs of a machine while it draws, or a server has it on GPUs of its own. The torch
    engine holds it whole on each GPU, and so do stages that do not train it, if it is not sharded.
    """
    is_ppo = stage.name == "ppo"
    sampling = state.settings if is_ppo else getattr(state.settings, "sampling", None)
    is_divided = is_ppo or shards(state.recipe.model, state.extent) > 1
    if sampling is None or not is_divided or state.extent.on_cpu or state.recipe.generation.vllm_server is not None:
        return
    new_tokens = sampling.max_new_tokens or state.recipe.sampling.max_new_tokens or Sampling.max_new_tokens
    prompt = state.extent.prompt or state.recipe.data.max_prompt_tokens
    shape, device = state.extent.shape, state.extent.device
    least = vllm_least(shape, prompt + new_tokens)
    parts = {
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "intermediate_size": shape.feed_forward,
    }

    def changed(generation: dict[str, Any], server_gpus: int = 0) -> _Changed:
        recipe = state.recipe.model_copy(update={"generation": GenerationSettings.model_validate(generation)})
        shown = ", ".join(f"{name}: {value}" for name, value in generation.items())
        return _Changed(f"generation={{{shown}}}", state.settings, recipe, state.extent, server_gpus=server_gpus)

    own = state.extent.machine or state.extent.processes
    yield (
        changed({"engine": "vllm", "tensor_parallel_size": size, "gpu_memory_utilization": tenths / 10})
        for size in range(1, own + 1)
        if own % size == 0 and indivisible(parts, size) is None
        for tenths in range(9, 0, -1)
        if least <= size * device * tenths / 10
    )
    yield (
        changed({"vllm_server": SERVER}, server_gpus=size)
        for size in (1, 2, 4, 8)
        if indivisible(parts, size) is None and least <= size * device * SERVER_SHARE
    )


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
