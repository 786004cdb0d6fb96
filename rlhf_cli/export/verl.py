"""A folder from which verl goes on: models, prompts as parquet, and a script with the settings of PPO."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.data.records import Prompt
from rlhf_cli.export.batch_sizes import BatchSizes
from rlhf_cli.export.engine_run import (
    POLICY,
    REWARD_MODEL,
    EngineRun,
    changed_settings,
    missing_generation,
    start_script,
)

VERSION = "0.9.1"
"""The version whose options are written."""

_CARRIED = (
    *("steps", "prompts_per_step", "samples_per_prompt", "epochs", "minibatches", "temperature", "max_new_tokens"),
    *("learning_rate", "critic_learning_rate", "warmup_share", "max_grad_norm", "critic_warmup_steps"),
    *("clip_range", "value_clip_range", "entropy_coef", "gamma", "gae_lambda", "kl_coef", "kl_in", "kl_target"),
    *("kl_horizon", "kl_estimator", "critic_from", "micro_batch_size", "rollout_batch_size", "gradient_checkpointing"),
)
_ACTOR, _ROLLOUT, _REF = (f"actor_rollout_ref.{name}" for name in ("actor", "rollout", "ref"))
_REWARD = "reward.reward_model"


def write_verl(run: EngineRun, folder: Path) -> str:
    """Write the folder, which exists, and return a sentence on each model."""
    made = run.write_models(folder)
    if not run.is_chat:
        _write_templates(run, folder)
    for name, prompts in (("prompts.parquet", run.train), ("held_out.parquet", run.held_out or run.train)):
        _write_prompts(run, prompts, folder / name)
    lines = ["python3 -m verl.trainer.main_ppo"]
    lines += [f"{name}={_written(value)}" for name, value in options(run, run.critic(folder)).items()]
    sizes = batch_sizes(run)
    script = start_script("verl", VERSION, run, sizes, " \\\n    ".join(lines), _missing(run))
    (folder / "train.sh").write_text(script, encoding="utf-8")
    return "\n".join(filter(None, (made, sizes.report(), run.lengths_report())))


def batch_sizes(run: EngineRun) -> BatchSizes:
    """Return the sizes of the recipe; verl counts a minibatch in prompts."""
    ppo, engine_gpus = run.ppo, run.recipe.generation.tensor_parallel_size
    minibatch = max(1, ppo.prompts_per_step // ppo.minibatches)
    return BatchSizes(ppo.prompts_per_step, minibatch, ppo.samples_per_prompt, ppo.micro_batch_size, engine_gpus)


def _write_templates(run: EngineRun, folder: Path) -> None:
    """Give both models a chat template that adds nothing: verl renders every prompt by one, and these are text."""
    plain = run.beginning + "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    end = "{% if messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    for name, template in ((POLICY, plain), (REWARD_MODEL, plain + end)):
        (folder / name / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_prompts(run: EngineRun, prompts: Sequence[Prompt], path: Path) -> None:
    import pyarrow  # of datasets
    import pyarrow.parquet

    rows = [
        {
            "data_source": run.name,
            "prompt": _messages(run, prompt),
            "reward_model": {"style": "model", "ground_truth": ""},
            "extra_info": {"index": number},
        }
        for number, prompt in enumerate(prompts)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _messages(run: EngineRun, prompt: Prompt) -> list[dict[str, str]]:
    if not run.is_chat:
        return [{"role": "user", "content": run.format.prompt_string(prompt)}]
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [{"role": message.role, "content": message.content} for message in prompt]


def _missing(run: EngineRun) -> dict[str, Any]:
    ppo = run.ppo
    carried = [*_CARRIED, *(["adapter", "lora"] if ppo.adapter == "lora" else [])]
    carried += ["schedule"] if ppo.schedule in ("constant", "cosine") else []
    found = changed_settings(ppo, carried)
    if ppo.schedule == "linear":
        found["ppo.schedule"] = "linear"  # our default, which it does not have
    found |= {"ppo.value_clip_range": None} if ppo.value_clip_range is None else {}
    return found | missing_generation(run)


def _written(value: Any) -> str:
    """Return a value as Hydra and the shell read it."""
    if isinstance(value, str) and value.startswith("$"):
        return f'"{value}"'
    text = json.dumps(value) if not isinstance(value, str) else value
    return f"'{text}'" if any(mark in text for mark in ' []{}"') else text


def options(run: EngineRun, critic: str) -> dict[str, Any]:
    """Return options of `verl.trainer.main_ppo`.

    Args:
        run: that is continued.
        critic: folder from which the critic starts.
    """
    ppo, sampling = run.ppo, run.sampling
    found: dict[str, Any] = {
        "algorithm.adv_estimator": "gae",
        "algorithm.gamma": ppo.gamma,
        "algorithm.lam": ppo.gae_lambda,
        "data.train_files": "$PWD/prompts.parquet",
        "data.val_files": "$PWD/held_out.parquet",
        "data.train_batch_size": ppo.prompts_per_step,
        "data.max_prompt_length": run.max_prompt_tokens,
        "data.max_response_length": run.max_new_tokens,
        "data.filter_overlong_prompts": True,
        "data.seed": run.recipe.seed,
        "actor_rollout_ref.model.path": f"$PWD/{POLICY}",
        "actor_rollout_ref.model.enable_gradient_checkpointing": ppo.gradient_checkpointing,
        f"{_ACTOR}.ppo_epochs": ppo.epochs,
        # Counted in prompts; verl multiplies it by the completions of each.
        f"{_ACTOR}.ppo_mini_batch_size": "$MINIBATCH",
        f"{_ACTOR}.ppo_micro_batch_size_per_gpu": "$MICRO_BATCH",
        f"{_ACTOR}.clip_ratio": ppo.clip_range,
        f"{_ACTOR}.clip_ratio_low": ppo.clip_range,
        f"{_ACTOR}.clip_ratio_high": ppo.clip_range,
        f"{_ACTOR}.entropy_coeff": ppo.entropy_coef,
        f"{_ACTOR}.grad_clip": ppo.max_grad_norm,
        f"{_ROLLOUT}.name": "vllm",
        f"{_ROLLOUT}.tensor_model_parallel_size": run.recipe.generation.tensor_parallel_size,
        f"{_ROLLOUT}.temperature": sampling.temperature,
        f"{_ROLLOUT}.n": ppo.samples_per_prompt,
        f"{_ROLLOUT}.log_prob_micro_batch_size_per_gpu": "$MICRO_BATCH",
        f"{_REF}.log_prob_micro_batch_size_per_gpu": "$MICRO_BATCH",
        "critic.model.path": f"$PWD/{critic}",
        "critic.ppo_micro_batch_size_per_gpu": "$MICRO_BATCH",
        "critic.grad_clip": ppo.max_grad_norm,
        f"{_REWARD}.enable": True,
        f"{_REWARD}.model_path": f"$PWD/{REWARD_MODEL}",
        f"{_REWARD}.rollout.name": "vllm",
        f"{_REWARD}.rollout.tensor_model_parallel_size": 1,
    }
    for name, rate in ((_ACTOR, ppo.peak_rate), ("critic", ppo.critic_peak_rate)):
        found |= {f"{name}.optim.lr": rate, f"{name}.optim.lr_warmup_steps_ratio": ppo.warmup_share}
        found[f"{name}.optim.weight_decay"] = 0.0
        if ppo.schedule != "linear":
            found[f"{name}.optim.lr_scheduler_type"] = ppo.schedule
    if ppo.value_clip_range is not None:
        found["critic.cliprange_value"] = ppo.value_clip_range
    if run.recipe.generation.changed("gpu_memory_utilization"):
        found[f"{_ROLLOUT}.gpu_memory_utilization"] = run.recipe.generation.gpu_memory_utilization
    if ppo.adapter == "lora":
        for name in ("actor_rollout_ref.model", "critic.model"):
            found |= {f"{name}.lora_rank": ppo.lora.rank, f"{name}.lora_alpha": int(ppo.lora.alpha)}
    return found | _kl(run) | _trainer(run)


def _kl(run: EngineRun) -> dict[str, Any]:
    ppo = run.ppo
    if ppo.kl_in == "loss":
        kinds = {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}
        found = {f"{_ACTOR}.use_kl_loss": True, f"{_ACTOR}.kl_loss_coef": ppo.kl_coef}
        return found | {f"{_ACTOR}.kl_loss_type": kinds[ppo.kl_estimator]}
    found: dict[str, Any] = {"algorithm.use_kl_in_reward": True, "algorithm.kl_penalty": "kl"}
    found["algorithm.kl_ctrl.type"] = "fixed" if ppo.kl_target is None else "adaptive"
    found["algorithm.kl_ctrl.kl_coef"] = ppo.kl_coef
    if ppo.kl_target is not None:
        found |= {"algorithm.kl_ctrl.target_kl": ppo.kl_target, "algorithm.kl_ctrl.horizon": int(ppo.kl_horizon)}
    return found


def _trainer(run: EngineRun) -> dict[str, Any]:
    return {
        "trainer.total_training_steps": run.ppo.steps,
        "trainer.total_epochs": run.passes,
        "trainer.critic_warmup": run.ppo.critic_warmup_steps,
        "trainer.n_gpus_per_node": "$GPUS",
        "trainer.nnodes": "$NODES",
        "trainer.logger": ["console"],
        "trainer.project_name": "rlhf",
        "trainer.experiment_name": run.name,
        "trainer.save_freq": run.ppo.checkpoint_steps,
        "trainer.default_local_dir": "$PWD/checkpoints",
    }
