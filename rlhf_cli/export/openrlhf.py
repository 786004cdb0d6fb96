"""A folder from which OpenRLHF goes on: models, prompts as JSONL, and a script with the settings of PPO."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from rlhf_cli.export.batch_sizes import BatchSizes
from rlhf_cli.export.engine_run import (
    POLICY,
    REWARD_MODEL,
    EngineRun,
    changed_settings,
    missing_generation,
    start_script,
)
from rlhf_cli.settings.shared import GenerationSettings

VERSION = "0.11.2"
"""The version whose options are written."""

_CARRIED = (
    *("steps", "prompts_per_step", "samples_per_prompt", "epochs", "minibatches", "temperature", "max_new_tokens"),
    *("learning_rate", "critic_learning_rate", "schedule", "warmup_share", "max_grad_norm", "critic_warmup_steps"),
    *("clip_range", "value_clip_range", "entropy_coef", "gamma", "gae_lambda", "kl_coef", "kl_in", "kl_target"),
    *("kl_horizon", "kl_estimator", "reward_clip", "critic_from", "micro_batch_size", "rollout_batch_size"),
    "gradient_checkpointing",
)
_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def write_openrlhf(run: EngineRun, folder: Path) -> str:
    """Write the folder, which exists, and return a sentence on each model."""
    made = run.write_models(folder)
    for name, prompts in (("prompts.jsonl", run.train), ("held_out.jsonl", run.held_out)):
        rows = (json.dumps({"input": run.text(prompt)}, ensure_ascii=False) for prompt in prompts)
        (folder / name).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    lines = ["python3 -m openrlhf.cli.train_ppo_ray"]
    for name, value in options(run, run.critic(folder)).items():
        lines.append(f"--{name}" if value is True else f"--{name} {_written(value)}")
    sizes = batch_sizes(run)
    script = start_script("OpenRLHF", VERSION, run, sizes, " \\\n    ".join(lines), _missing(run))
    (folder / "train.sh").write_text(script, encoding="utf-8")
    return "\n".join(filter(None, (made, sizes.report(), run.lengths_report())))


def batch_sizes(run: EngineRun) -> BatchSizes:
    """Return the sizes of the recipe; OpenRLHF counts a minibatch in completions."""
    ppo = run.ppo
    completions = ppo.completions_per_step
    engine_gpus = run.recipe.generation.tensor_parallel_size
    return BatchSizes(completions, completions // ppo.minibatches, 1, ppo.micro_batch_size, engine_gpus)


def _written(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value) if isinstance(value, str) and value.startswith("$") else shlex.quote(str(value))


def _missing(run: EngineRun) -> dict[str, Any]:
    ppo = run.ppo
    carried = [*_CARRIED, *(["adapter", "lora"] if ppo.adapter == "lora" else [])]
    if ppo.missing_eos_reward is not None and ppo.missing_eos_reward < 0:
        carried.append("missing_eos_reward")
    found = changed_settings(ppo, carried)
    found |= {"ppo.value_clip_range": None} if ppo.value_clip_range is None else {}
    return found | missing_generation(run)


def options(run: EngineRun, critic: str) -> dict[str, Any]:
    """Return options of `openrlhf.cli.train_ppo_ray`; True stands for one without a value.

    Args:
        run: that is continued.
        critic: folder from which the critic starts.
    """
    ppo, sampling = run.ppo, run.sampling
    found: dict[str, Any] = {
        "actor.model_name_or_path": POLICY,
        "reward.model_name_or_path": REWARD_MODEL,
        "critic.model_name_or_path": critic,
        "data.prompt_dataset": "prompts.jsonl",
        "data.input_key": "input",
        "data.max_len": run.max_prompt_tokens + run.max_new_tokens,
        "rollout.max_new_tokens": run.max_new_tokens,
        "rollout.temperature": sampling.temperature,
        "rollout.batch_size": ppo.prompts_per_step,
        "rollout.n_samples_per_prompt": ppo.samples_per_prompt,
        "rollout.micro_batch_size": "$MICRO_BATCH",
        "train.num_episodes": run.passes,
        "train.batch_size": "$MINIBATCH",
        "train.micro_batch_size": "$MICRO_BATCH",
        "train.max_epochs": ppo.epochs,
        "train.seed": run.recipe.seed,
        "algo.advantage.estimator": "gae",
        "algo.advantage.gamma": ppo.gamma,
        "algo.advantage.lambd": ppo.gae_lambda,
        "algo.kl.init_coef": ppo.kl_coef,
        "algo.kl.estimator": ppo.kl_estimator,
        "actor.eps_clip": ppo.clip_range,
    }
    if ppo.value_clip_range is not None:
        found["critic.value_clip"] = ppo.value_clip_range
    if ppo.critic_warmup_steps:
        found["critic.freezing_steps"] = ppo.critic_warmup_steps
    for name, rate in (("actor", ppo.peak_rate), ("critic", ppo.critic_peak_rate)):
        found |= {f"{name}.adam.lr": rate, f"{name}.adam.eps": 1e-5, f"{name}.max_norm": ppo.max_grad_norm}
        found |= {f"{name}.lr_scheduler": _SCHEDULES[ppo.schedule], f"{name}.lr_warmup_ratio": ppo.warmup_share}
    if ppo.entropy_coef:
        found["actor.entropy_coef"] = ppo.entropy_coef
    if ppo.kl_in == "loss":
        found["algo.kl.use_loss"] = True
    if ppo.kl_target is not None:
        found |= {"algo.kl.target": ppo.kl_target, "algo.kl.horizon": int(ppo.kl_horizon)}
    if ppo.missing_eos_reward is not None and ppo.missing_eos_reward < 0:
        found["reward.stop_properly_penalty_coef"] = ppo.missing_eos_reward
    if ppo.adapter == "lora":
        found |= {"ds.lora.rank": ppo.lora.rank, "ds.lora.alpha": int(ppo.lora.alpha)}
    if ppo.gradient_checkpointing:
        found["actor.gradient_checkpointing_enable"] = True
    return found | _cluster(ppo.reward_clip, run.recipe.generation)


def _cluster(reward_clip: float | None, generation: GenerationSettings) -> dict[str, Any]:
    """Return the options of the machines: all models share all GPUs, as do the vLLM engines."""
    found: dict[str, Any] = {}
    for role in ("actor", "ref", "critic", "reward"):
        found |= {f"{role}.num_nodes": "$NODES", f"{role}.num_gpus_per_node": "$GPUS"}
    if reward_clip is not None:
        found["reward.clip_range"] = [-reward_clip, reward_clip]
    size, changed = generation.tensor_parallel_size, generation.changed("gpu_memory_utilization")
    found |= {"train.colocate_all": True, "vllm.num_engines": f"$((NODES * GPUS / {size}))", "vllm.enable_sleep": True}
    found |= {"vllm.tensor_parallel_size": size}
    found |= {"vllm.gpu_memory_utilization": generation.gpu_memory_utilization if changed else 0.5}
    found |= {"ds.enable_sleep": True, "ds.zero_stage": 3, "ds.param_dtype": "bf16"}
    return found | {"ckpt.output_dir": "trained", "ckpt.path": "checkpoints"}
