"""Declaration of the `ppo` stage."""

from __future__ import annotations

import math

from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.base import Flag, Sizes, Stage, StageContext, training_bytes
from rlhf_cli.stages.ppo.inputs import PPOInputs, check_combination, find_inputs
from rlhf_cli.stages.ppo.memory import ppo_memory
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
    if settings.overlap_rollouts and settings.importance_cap is None:
        raise ValueError("`ppo.overlap_rollouts` needs `ppo.importance_cap`, which corrects for the older policy")
    if settings.overlap_rollouts and recipe.generation.vllm_server is None:
        raise ValueError(
            "`ppo.overlap_rollouts` needs `generation.vllm_server`: another engine has no GPU while the policy trains"
        )
    draws_with_vllm = recipe.generation.engine == "vllm" or recipe.generation.vllm_server is not None
    if recipe.model.quantize != "none" and draws_with_vllm:
        raise ValueError(
            f"`ppo` cannot hand the weights of a policy with `model.quantize: {recipe.model.quantize}` to vLLM: set "
            "`model.quantize: none` or `generation.engine: torch`"
        )


def _fixed_steps(settings: PPOSettings) -> str | None:
    by = settings.rates_depend_on_steps
    if by is None:
        return None
    return (
        f"with `ppo.{by}` the learning rates of all steps depend on `ppo.steps` (`constant` without warmup continues)"
    )


def _disk_bytes(settings: PPOSettings, model_bytes: int) -> int:
    policy = int(settings.adapter == "none")
    critic = int(settings.critic_is_separate)
    best = model_bytes * (policy + critic) if settings.kl_budget is not None else 0
    steps = 0 if settings.save_steps is None else (settings.steps - 1) // settings.save_steps
    return best + training_bytes(
        model_bytes, trained=policy + critic, written=1 + critic + steps, kept=settings.keep_checkpoints
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
    memory=ppo_memory,
    workload="rlhf_cli.stages.ppo.workload",
    unaffected_by=("model.build",),
    steps_setting="ppo.steps",
    fixed_steps=_fixed_steps,
)
