"""TRL's side of `ppo_peer.py`: the PPO trainer of TRL 1.12.0 on the same folders, in a separate environment.

    PEER/bin/python benchmarks/ppo_peer_trl.py WORK --seeds 0 1 2 3 4

The settings avoid known problems of this trainer: float32 weights, a pad token that differs from the end token, one
batch without gradient accumulation (which overrides its minibatches). TRL's metrics are written to `metrics.jsonl`. The
reward model returns the same rewards as on our side: its head is scaled and shifted according to `reward.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # pyright: ignore[reportMissingImports]


class Snapshots(TrainerCallback):
    """Saves the policy every few steps and the metrics of every step."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every

    def on_step_end(self, args, state, control, model=None, **_) -> None:
        """Save the policy; `model` holds policy and critic."""
        if model is not None and state.global_step % self.every == 0:
            weights = {name: value.detach().clone() for name, value in model.policy.state_dict().items()}
            save_file(weights, self.folder / f"step-{state.global_step}.safetensors")

    def on_log(self, args, state, control, logs=None, **_) -> None:
        """Write one line per step."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step} | (logs or {})) + "\n")


def main() -> None:
    """Run every seed with every KL coefficient; existing results are skipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--kl-coefs", type=float, nargs="+", default=[0.02, 0.05, 0.15])
    parser.add_argument("--name", default="trl", help="name of this side in folders and plots")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = json.loads((options.work / "settings.json").read_text(encoding="utf-8"))
    for seed in options.seeds:
        for kl_coef in options.kl_coefs:
            folder = options.work / f"seed{seed}"
            output = folder / f"{options.name}-{kl_coef:g}"
            if not (output / "seconds.json").is_file():
                output.mkdir(exist_ok=True)
                (output / "metrics.jsonl").unlink(missing_ok=True)
                train(folder, output, seed, kl_coef, settings)


def train(folder: Path, output: Path, seed: int, kl_coef: float, settings: dict) -> None:
    """Train once."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft", padding_side="left")
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))["training"]
    data = Dataset.from_list([{"input_ids": prompt["ids"]} for prompt in prompts])
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "sft", dtype=torch.float32) for _ in range(2))
    trainer = PPOTrainer(
        args=ppo_config(output / "trl", settings, kl_coef=kl_coef, seed=seed),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=_scorer(folder, tokenizer.pad_token_id),
        value_model=_critic(folder, tokenizer.pad_token_id, settings["critic_from"]),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        callbacks=[Snapshots(output, settings["snapshot_steps"])],
    )
    start, cpu = time.time(), time.process_time()
    trainer.train()
    seconds = {"wall": time.time() - start, "cpu": time.process_time() - cpu}
    (output / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


def ppo_config(
    output: Path, settings: dict, *, kl_coef: float, seed: int = 0, micro_batch: int | None = None, use_cpu: bool = True
) -> PPOConfig:
    """Map settings in our names to TRL's.

    Args:
        output: folder that TRL wants.
        settings: see `ppo_peer.SETTINGS`.
        kl_coef: coefficient of the KL penalty.
        seed: of the run.
        micro_batch: completions per forward and backward pass; None is all of a step. TRL then has one minibatch.
        use_cpu: ignore a GPU.
    """
    answers = settings["prompts_per_step"]
    micro_batch = micro_batch or answers
    return PPOConfig(
        output_dir=str(output),
        seed=seed,
        total_episodes=settings["steps"] * answers,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=answers // micro_batch,
        local_rollout_forward_batch_size=answers,
        num_mini_batches=settings["minibatches"],
        num_ppo_epochs=settings["epochs"],
        response_length=settings["max_new_tokens"],
        stop_token="eos",
        temperature=settings["temperature"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings["schedule"],
        adam_epsilon=1e-5,
        weight_decay=0.0,
        max_grad_norm=settings["max_grad_norm"],
        cliprange=settings["clip_range"],
        cliprange_value=settings["value_clip_range"],
        vf_coef=settings["value_coef"],
        gamma=settings["gamma"],
        lam=settings["gae_lambda"],
        kl_coef=kl_coef,
        kl_estimator="k1",
        whiten_rewards=False,
        missing_eos_penalty=settings["missing_eos_penalty"],
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=use_cpu,
    )


def _scorer(folder: Path, pad_token_id: int) -> LlamaForSequenceClassification:
    """Load the reward model with the normalization of our side: (w h - mean) / std."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32)
    card = json.loads((folder / "reward" / "reward.json").read_text(encoding="utf-8"))
    return _with_head(model, model.score.weight.detach() / card["std"], -card["mean"] / card["std"], pad_token_id)


def _critic(folder: Path, pad_token_id: int, start: str) -> LlamaForSequenceClassification:
    """Initialize the critic from the reward model, or from the SFT model with a head that predicts 0."""
    if start == "reward-model":
        return _scorer(folder, pad_token_id)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "sft", num_labels=1, dtype=torch.float32)
    return _with_head(model, torch.zeros_like(model.score.weight), 0.0, pad_token_id)


def _with_head(
    model: LlamaForSequenceClassification, weight: torch.Tensor, bias: float, pad_token_id: int
) -> LlamaForSequenceClassification:
    head = nn.Linear(weight.shape[1], 1)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.fill_(bias)
    model.score = head
    model.config.pad_token_id = pad_token_id
    return model


if __name__ == "__main__":
    main()
