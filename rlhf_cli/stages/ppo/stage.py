"""Declaration of the `ppo` stage."""

from __future__ import annotations

import math

from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.memory_estimate import (
    FLOAT32,
    MemoryNeed,
    ModelShape,
    frozen_bytes,
    number_bytes,
    training_need,
)
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.base import Flag, Sizes, Stage, StageContext, training_bytes
from rlhf_cli.stages.ppo.inputs import PPOInputs, check_combination, find_inputs
from rlhf_cli.stages.ppo.settings import PPOSettings


def _sizes(settings: PPOSettings, recipe: RunSettings) -> Sizes:
    completions, per_step = settings.completions_per_step, settings.optimizer_steps_per_step
    largest = math.ceil(completions / settings.minibatches)
    is_even = completions % settings.minibatches == 0
    sizes: dict[str, int | str] = {
        "completions per step": completions,
        "episodes in total": settings.steps * completions,
        "optimizer steps per step": per_step,
        "optimizer steps in total": settings.optimizer_steps,
        "completions per minibatch": largest if is_even else f"{largest - 1} to {largest}",
        "micro-batches per minibatch": math.ceil(largest / settings.micro_batch_size),
        "checkpoints kept": settings.keep_checkpoints + (settings.kl_budget is not None),
        "peak learning rate": f"{settings.peak_rate:g}",
        "peak learning rate of the critic": f"{settings.critic_peak_rate:g}",
    }
    longest = settings.max_new_tokens or recipe.sampling.max_new_tokens
    if longest is not None:
        sizes["maximum tokens sampled per step"] = completions * longest
        sizes["maximum tokens sampled in total"] = settings.steps * completions * longest
    if settings.warmup_share:
        sizes["optimizer steps of warm-up"] = round(settings.warmup_share * settings.optimizer_steps)
    if settings.ptx is not None:
        sizes["demonstrations read in total"] = settings.optimizer_steps * settings.ptx.batch_size
    if settings.eval_steps is not None:
        sizes["evaluations"] = 1 + math.ceil(settings.steps / settings.eval_steps)
    return sizes


def _check(settings: PPOSettings, recipe: RunSettings) -> None:
    members = None if settings.reward_model is not None else recipe.value("train_rm.members")
    check_combination(settings, members)


def _disk_bytes(settings: PPOSettings, model_bytes: int) -> int:
    policy = int(settings.adapter == "none")
    critic = int(settings.critic_is_separate)
    best = model_bytes * (policy + critic) if settings.kl_budget is not None else 0
    steps = 0 if settings.save_steps is None else (settings.steps - 1) // settings.save_steps
    return best + training_bytes(
        model_bytes, trained=policy + critic, written=1 + critic + steps, kept=settings.keep_checkpoints
    )


def _device_need(settings: PPOSettings, recipe: RunSettings, shape: ModelShape) -> MemoryNeed:
    """Of policy, reference and critic; a reward model with a backbone of its own comes on top."""
    model, is_full = recipe.model, settings.adapter == "none"
    size = number_bytes(model.precision)
    sampled = settings.max_new_tokens or recipe.sampling.max_new_tokens or Sampling.max_new_tokens
    longest = recipe.data.max_prompt_tokens + sampled
    rows = min(settings.rollout_batch_size, settings.completions_per_step)
    minibatch = math.ceil(settings.completions_per_step / settings.minibatches) * longest
    most = settings.micro_batch_tokens
    tokens = min(minibatch, settings.micro_batch_size * longest if most is None else max(longest, most))
    adapter = shape.adapter(settings.lora.rank)
    policy = shape.weights if is_full else adapter
    critic = adapter if settings.critic_is_adapter else shape.weights if settings.critic_is_separate else 0
    return training_need(
        trained=policy + critic,
        frozen=shape.weights,
        frozen_bytes=FLOAT32 if is_full else frozen_bytes(model.dtype, model.precision, model.quantize),
        activations=shape.activations(tokens, size, recompute=settings.gradient_checkpointing) + shape.logits(tokens),
        decoding=shape.cache(rows, longest, size) + shape.sampling(rows),
        optimizer=settings.optimizer,
        embeddings=shape.embeddings * (int(is_full) + int(settings.critic_is_separate)),
        offloads=is_full and settings.offload_frozen,
    )


PPOContext = StageContext[PPOSettings, PPOInputs]

STAGE = Stage(
    name="ppo",
    settings=PPOSettings,
    inputs_type=PPOInputs,
    inputs=find_inputs,
    writes="PPO policy",
    module="rlhf_cli.stages.ppo.run",
    flags=(
        Flag(
            "--model",
            "ppo.model",
            "Initial policy; default: the output of `sft`.",
            "MODEL",
        ),
        Flag("--reward-model", "ppo.reward_model", "Reward model; default: the output of `train-rm`.", "MODEL"),
        Flag(
            "--function",
            "ppo.rewards",
            "Reward: a Python function; repeatable.",
            "FILE.py:NAME",
            repeatable=True,
            entry="function",
        ),
        Flag(
            "--reward-url",
            "ppo.rewards",
            "Reward: an HTTP endpoint; repeatable.",
            "URL",
            repeatable=True,
            entry="url",
        ),
        Flag("--prompts", "ppo.prompts", "Prompts: a file, folder or hub data set.", "DATA"),
    ),
    sizes=_sizes,
    check=_check,
    disk_bytes=_disk_bytes,
    device_need=_device_need,
    unaffected_by=("model.build",),
)
