"""Memory of PPO: policy, reference, critic and reward model, by phase. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.model_shape import FLOAT32
from rlhf_cli.models.resources import (
    Extent,
    MemoryNeed,
    frozen_bytes,
    loading,
    memory_need,
    moments,
    number_bytes,
    own_part,
    saving,
    sent,
    shards,
    vllm_share,
)
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.stages.training_memory import checkpoint_copy


def ppo_memory(settings: PPOSettings, recipe: RunSettings, extent: Extent) -> MemoryNeed:
    """Return the memory of the stage; `extent.reward` is a reward model with a backbone of its own."""
    model, shape, is_full = recipe.model, extent.shape, settings.adapter == "none"
    size = number_bytes(model.precision)
    adapter, parts = shape.adapter(settings.lora.rank), shards(model, extent)
    held = FLOAT32 if is_full else frozen_bytes(model.dtype, model.precision, model.quantize)
    critic = adapter if settings.critic_is_adapter else shape.weights if settings.critic_is_separate else 0
    policy = shape.weights if is_full else adapter
    own = partial(own_part, model, extent)
    weights = {"policy": own(FLOAT32 * policy), "critic": own(FLOAT32 * critic)}
    # Under adapters the frozen weights of the policy are the reference, and are always held.
    reference = {"reference": own(held * shape.weights)}
    weights |= {} if is_full else reference
    reward = {} if extent.reward is None else {"reward model": own(extent.reward.weights * size)}
    is_mapped = extent.on_cpu and parts == 1  # weights that only score, while they are not used
    rests = is_mapped or settings.offload_frozen
    scoring = (reference if is_full else {}) | reward
    kept = weights if rests else weights | scoring
    small = shape.embeddings * (int(is_full) + int(settings.critic_is_separate))
    state = {"optimizer": own(moments(policy + critic, settings.optimizer, small))}
    tokens, longest = _tokens(settings, recipe, extent)
    activations = {
        "activations": float(
            shape.activations(
                tokens,
                size,
                recompute=settings.gradient_checkpointing,
                rank=None if is_full else settings.lora.rank,
                on_cpu=extent.on_cpu,
            )
        ),
        "logits": float(shape.logits(tokens)),
    }
    drawing = _drawing(settings, recipe, extent, held=held, size=size, longest=longest)
    once = {"activations": float(shape.transient(tokens, size)), "logits": float(shape.logits(tokens))}
    cpu, rank = extent.on_cpu, None if is_full else settings.lora.rank
    gather = partial(shape.gathered, size, rank=rank, adapters=_adapters(settings), on_cpu=cpu)
    scored = 0.0 if extent.reward is None else extent.reward.gathered(size, on_cpu=cpu)
    passed = {"gathered": max(gather(), scored)} if parts > 1 else {}
    trained = {"gathered": gather(trains=True)} if parts > 1 else {}
    gradients = {"gradients": own(FLOAT32 * (policy + critic))}
    copy = checkpoint_copy(recipe, extent, own(FLOAT32 * (policy + critic)) + state["optimizer"])
    kept_to_save = FLOAT32 * float(critic)
    if parts > 1:  # of the critic also what is read back to be compared
        kept_to_save = 2 * own(kept_to_save) + sum(scoring.values())
    phases = {
        "load": loading(extent, weights | (scoring if not rests else {}), parts),
        "rollout": kept | state | copy | drawing,
        "passes": weights | scoring | state | copy | once | passed,
        "update": kept | state | copy | gradients | activations | trained,
        "save": saving(extent, kept=kept_to_save, parts=parts, offloads=model.sharding_cpu_offload),
    }
    if settings.save_steps is not None and (parts > 1 or extent.on_cpu):
        held = weights | scoring if parts > 1 else kept
        phases["save_steps"] = held | state | copy | _copied(extent, own, parts)
    return memory_need(extent, phases, *(scoring if is_mapped else ()))


def _copied(extent: Extent, own: Callable[[float], float], parts: int) -> dict[str, float]:
    """Roles of writing the policy beside all that trains, see `saving`: the policy is a copy of the one that trains."""
    size = FLOAT32 * extent.shape.weights
    if parts > 1:  # what is read back takes the place of the copy
        return {"copy to write": own(size), "gathered": extent.shape.gathered(FLOAT32, on_cpu=extent.on_cpu)}
    return {"copied policy": size, "copy to write": size}


def _drawing(
    settings: PPOSettings, recipe: RunSettings, extent: Extent, *, held: float, size: int, longest: int
) -> dict[str, float]:
    """Roles of drawing completions besides weights and moments."""
    shape, parts = extent.shape, shards(recipe.model, extent)
    if recipe.generation.vllm_server is not None:
        return {"sent": sent(shape)}
    if recipe.generation.engine == "vllm":  # which gets the weights one layer after another
        gathered = shape.gathered(FLOAT32, on_cpu=extent.on_cpu) if parts > 1 else 0.0
        return {"vLLM": vllm_share(shape, recipe.generation, extent, longest), "gathered": gathered}
    rows = math.ceil(settings.completions_per_step / extent.processes)
    rows = min(settings.rollout_batch_size, rows)
    # What `models.adapter_merging` puts in the place of float32 weights while tokens are drawn.
    merged = settings.adapter == "lora" and held == size == FLOAT32 and parts == 1
    drawing = {"cache": float(shape.cache(rows, longest, size)), "logits": float(shape.sampling(rows))}
    drawing["merged adapter"] = float(FLOAT32 * shape.backbone * merged)
    if parts > 1:  # the whole policy, for every token, with the adapters on it
        whole = shape.weights * size + FLOAT32 * _adapters(settings) * shape.adapter(settings.lora.rank)
        drawing["gathered"] = whole + (2.0 * shape.sent_at_once(size) if extent.on_cpu else 0.0)
    return drawing


def _adapters(settings: PPOSettings) -> int:
    """Number of adapters on the backbone: of policy and critic."""
    return 0 if settings.adapter == "none" else 1 + int(settings.critic_is_adapter)


def _tokens(settings: PPOSettings, recipe: RunSettings, extent: Extent) -> tuple[int, int]:
    """Tokens of the largest micro-batch, and of the longest prompt with its completion."""
    sampled = settings.max_new_tokens or recipe.sampling.max_new_tokens or Sampling.max_new_tokens
    longest = (extent.prompt or recipe.data.max_prompt_tokens) + sampled
    most = settings.micro_batch_tokens
    minibatch = math.ceil(settings.completions_per_step / settings.minibatches) * longest
    by_settings = min(minibatch, settings.micro_batch_size * longest if most is None else max(longest, most))
    return extent.tokens or by_settings, longest
