"""Memory of PPO: policy, reference, critic and reward model, by phase. Imports no torch."""

from __future__ import annotations

import math

from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.resources import (
    FLOAT32,
    Extent,
    MemoryNeed,
    frozen_bytes,
    loading,
    memory_need,
    moments,
    number_bytes,
    saving,
)
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.ppo.settings import PPOSettings


def ppo_memory(settings: PPOSettings, recipe: RunSettings, extent: Extent) -> MemoryNeed:
    """Return the memory of the stage; `extent.reward` is a reward model with a backbone of its own."""
    model, shape, is_full = recipe.model, extent.shape, settings.adapter == "none"
    size = number_bytes(model.precision)
    adapter = shape.adapter(settings.lora.rank)
    held = FLOAT32 if is_full else frozen_bytes(model.dtype, model.precision, model.quantize)
    critic = adapter if settings.critic_is_adapter else shape.weights if settings.critic_is_separate else 0
    policy = shape.weights if is_full else adapter
    weights = {"policy": float(FLOAT32 * policy), "critic": float(FLOAT32 * critic)}
    # Under adapters the frozen weights of the policy are the reference, and are always held.
    reference = {"reference": held * shape.weights}
    weights |= {} if is_full else reference
    reward = {} if extent.reward is None else {"reward model": float(extent.reward.weights * size)}
    rests = extent.on_cpu or settings.offload_frozen  # weights that only score, while they are not used
    scoring = (reference if is_full else {}) | reward
    kept = weights if rests else weights | scoring
    small = shape.embeddings * (int(is_full) + int(settings.critic_is_separate))
    state = {"optimizer": float(moments(policy + critic, settings.optimizer, small))}
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
    rows = min(settings.rollout_batch_size, settings.completions_per_step)
    # What `models.adapter_merging` puts in the place of float32 weights while tokens are drawn.
    merged = FLOAT32 * shape.backbone if not is_full and held == size == FLOAT32 else 0
    drawing = {"cache": shape.cache(rows, longest, size), "logits": shape.sampling(rows), "merged adapter": merged}
    once = {"activations": float(shape.transient(tokens, size)), "logits": float(shape.logits(tokens))}
    phases = {
        "load": loading(extent, weights | (scoring if not rests else {})),
        "rollout": kept | state | drawing,
        "passes": weights | scoring | state | once,
        "update": kept | state | {"gradients": float(FLOAT32 * (policy + critic))} | activations,
        "save": saving(extent, kept=FLOAT32 * critic),
    }
    return memory_need(extent, phases, *(scoring if extent.on_cpu else ()))


def _tokens(settings: PPOSettings, recipe: RunSettings, extent: Extent) -> tuple[int, int]:
    """Tokens of the largest micro-batch, and of the longest prompt with its completion."""
    sampled = settings.max_new_tokens or recipe.sampling.max_new_tokens or Sampling.max_new_tokens
    longest = (extent.prompt or recipe.data.max_prompt_tokens) + sampled
    most = settings.micro_batch_tokens
    minibatch = math.ceil(settings.completions_per_step / settings.minibatches) * longest
    by_settings = min(minibatch, settings.micro_batch_size * longest if most is None else max(longest, most))
    return extent.tokens or by_settings, longest
