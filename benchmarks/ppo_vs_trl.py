"""Compare the speed and memory of `rlhf ppo` with the last PPO trainer of TRL (1.12.0) on the same work.

    python benchmarks/ppo_vs_trl.py --model SmolLM2-135M-Instruct --prompts hh_harmless_pairs.jsonl.gz
    python benchmarks/ppo_vs_trl.py ... --adapter none --precision float32 bfloat16 --peer-dtype float32 bfloat16
    python benchmarks/ppo_vs_trl.py --peer-env none                ours alone, on a tiny model

The work is one PPO step (or `--steps`): prompts of at most 80 tokens, one completion each of at most 32 tokens at
temperature 0.7, policy, reference, reward model and critic of the same size, one minibatch, 4 epochs. With `--adapter
lora` the policy is a LoRA adapter of rank 16 on both sides; TRL's critic is then still a full model, since it has no
other. The reward model of both sides is one folder: the model with a random head. TRL runs in an environment of its
own, which the first run creates.

Sides alternate, each in a process of its own, once per round. Timed is the training without loading: of `rlhf ppo` the
training loop without its checkpoints, which TRL does not write here, and of TRL `trainer.train()`. Peak memory is that
of the whole process, or of the GPU's allocator. The first update's ratio and KL show that both compute what they
should: before its first step they are 1 and 0 but for rounding. TRL logs the ratio as a mean over all epochs of the
update alone, in which it moves.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import comparison

SETTINGS: dict[str, Any] = {
    "epochs": 4,
    "minibatches": 1,
    "temperature": 0.7,
    "learning_rate": 1e-6,
    "schedule": "linear",
    "max_grad_norm": 1.0,
    "clip_range": 0.2,
    "value_clip_range": 0.2,
    "value_coef": 0.1,
    "gamma": 1.0,
    "gae_lambda": 0.95,
    "kl_coef": 0.05,
    "missing_eos_penalty": 1.0,
}
"""In our names; `ppo_peer_trl.py` maps them to TRL's."""


def main() -> int:
    """Run the rounds and print the tables; or, as the other side's process, train once."""
    if comparison.train_as_peer(peer):
        return 0
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        runner = comparison.Runner(Path(folder), options.threads, options.train_only)
        task = prepare(options, runner.work)
        sides = {f"rlhf {one}": partial(ours, runner, task, one) for one in options.precision}
        if options.peer_env != "none":
            python = comparison.peer_python(Path(options.peer_env))
            sides |= {f"TRL {one}": partial(theirs, runner, task, one, python) for one in options.peer_dtype}
        results = comparison.alternate(sides, options.pairs)
    title = f"PPO, {options.name or Path(task['model']).name}, adapter: {options.adapter}"
    report = f"{comparison.heading(title, results, options.threads)}\n" + comparison.markdown(
        results,
        unit="episodes",
        count=options.episodes * options.steps,
        is_ours=lambda name: name.startswith("rlhf"),
        extra={
            "ratio before the first step": lambda row: (
                f"{row['first_ratio']:.6f}" if row["first_ratio"] is not None else "not logged"
            ),
            "mean ratio of the first update": lambda row: f"{row['ratio']:.6f}",
            "first update's KL": lambda row: f"{row['kl']:.1e}",
            "checkpoints, seconds": lambda row: f"{row['checkpoint_seconds']:.1f}",
        },
    )
    comparison.publish(report, results, options.json)
    return 0


def _options() -> argparse.Namespace:
    parser = comparison.parser(__doc__, adapter="lora")
    parser.add_argument("--reward-model", help="folder of a classifier; default: the model with a random head")
    parser.add_argument("--prompts", type=Path, help="prompts, or pairs of dialogues; default: random words")
    parser.add_argument("--prompt-tokens", type=int, default=80, help="maximum length of a prompt")
    parser.add_argument("--peer-dtype", nargs="+", default=["float32"], help="weights and computation of TRL")
    parser.add_argument("--peer-env", default=str(comparison.PEER_ENVIRONMENT), help="folder; `none`: ours alone")
    parser.add_argument("--episodes", type=int, default=32, help="completions per step")
    parser.add_argument("--steps", type=int, default=1, help="PPO steps, of so many episodes each")
    parser.add_argument("--response-tokens", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=8)
    return parser.parse_args()


def prepare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Write the model, the reward model and the prompts as text and token ids; returns the work of both sides."""
    from rlhf_cli.data.chat_format import PromptFormat
    from rlhf_cli.models.loading import ModelSource, load_tokenizer

    shape = comparison.SHAPES["tiny"]
    model = str(options.model or comparison.random_llama(work / "tiny", shape))
    tokenizer = load_tokenizer(ModelSource(model))
    form = PromptFormat(tokenizer, "chat" if tokenizer.chat_template else None, name=model)
    count = options.episodes * options.steps
    if options.prompts is None:
        texts: Iterator[str] = iter(comparison.random_texts(count, options.prompt_tokens, vocabulary=len(tokenizer)))
    else:
        texts = _texts(options.prompts)
    pairs = ((text, form.prompt_ids(text)) for text in dict.fromkeys(texts))
    chosen = list(itertools.islice((one for one in pairs if len(one[1]) <= options.prompt_tokens), count))
    if len(chosen) < count:
        sys.exit(f"{len(chosen)} prompts of at most {options.prompt_tokens} tokens; {count} are needed")
    ids = [ids for _, ids in chosen]
    pad_token = comparison.padding_token(tokenizer, ids)
    lines = "".join(json.dumps({"prompt": text}) + "\n" for text, _ in chosen)
    (work / "prompts.jsonl").write_text(lines, encoding="utf-8")
    (work / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
    pad_token_id = tokenizer.convert_tokens_to_ids(pad_token)
    reward = options.reward_model or comparison.write_classifier(model, work / "reward", pad_token_id=pad_token_id)
    return {
        "model": model,
        "reward_model": str(reward),
        "prompts": str(work / "prompts.jsonl"),
        "ids": str(work / "ids.json"),
        "pad_token": pad_token,
        "adapter": options.adapter,
        "micro_batch": options.micro_batch,
        "threads": options.threads,
        "output": str(work / "trl"),
        "changes": comparison.changes(options.set),
        "settings": SETTINGS
        | {
            "steps": options.steps,
            "prompts_per_step": options.episodes,
            "max_new_tokens": options.response_tokens,
            "epochs": options.epochs,
        },
    }


def _texts(path: Path) -> Iterator[str]:
    """Read prompts: records with `prompt`, or published dialogues, of which the first human turn is taken."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for record in map(json.loads, file):
            first = record.get("prompt") or record["chosen"].split("\n\nAssistant:")[0].replace("\n\nHuman:", "")
            yield first.strip()


def ours(runner: comparison.Runner, task: dict[str, Any], precision: str) -> comparison.Row:
    """Run `rlhf ppo` once."""
    settings = task["settings"] | {
        "model": task["model"],
        "reward_model": task["reward_model"],
        "adapter": task["adapter"],
        "micro_batch_size": task["micro_batch"],
        "rollout_batch_size": task["settings"]["prompts_per_step"],
    }
    recipe = {
        "model": comparison.model_section(task["model"], precision, task["threads"]),
        "data": {"prompts": task["prompts"], "holdout": 0.0},
        "ppo": settings | task["changes"],
    }
    found = runner.stage("ppo", recipe)
    row = found.pop("rows")[0]
    ratios = {"first_ratio": row["val/first_epoch_ratio"], "ratio": row["val/ratio"]}
    return found | ratios | {"kl": row["objective/kl"], "metrics": row}


def theirs(runner: comparison.Runner, task: dict[str, Any], dtype: str, python: Path) -> comparison.Row:
    """Run TRL's trainer once."""
    file = runner.work / f"task-{dtype}.json"
    file.write_text(json.dumps(task | {"dtype": dtype}), encoding="utf-8")
    return runner.call([python, __file__, "--as-peer", file, comparison.RESULT])


def peer(task: dict[str, Any], result: Path) -> None:
    """Train once with TRL, in its environment."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from ppo_peer_trl import ppo_config
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOTrainer  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(task["threads"])
    settings, dtype, is_lora = task["settings"], getattr(torch, task["dtype"]), task["adapter"] == "lora"
    tokenizer = AutoTokenizer.from_pretrained(task["model"], padding_side="left")
    tokenizer.pad_token = task["pad_token"]
    ids = json.loads(Path(task["ids"]).read_text(encoding="utf-8"))
    data = Dataset.from_list([{"input_ids": one} for one in ids])
    logged: dict[str, float] = {}

    class FirstLog(TrainerCallback):
        """Keeps the metrics of the first update."""

        def on_log(self, args, state, control, logs=None, **_) -> None:
            """Keep them."""
            for name, value in (logs or {}).items():
                logged.setdefault(name, value)

    def scorer() -> torch.nn.Module:
        model = AutoModelForSequenceClassification.from_pretrained(task["reward_model"], dtype=dtype)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    def policy() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype)

    adapter = None
    if is_lora:
        from peft import LoraConfig

        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = PPOTrainer(
        args=ppo_config(
            Path(task["output"]),
            settings,
            kl_coef=settings["kl_coef"],
            micro_batch=task["micro_batch"],
            use_cpu=not torch.cuda.is_available(),
        ),
        processing_class=tokenizer,
        model=policy(),
        ref_model=None if is_lora else policy(),
        reward_model=scorer(),
        value_model=scorer(),
        train_dataset=data,
        eval_dataset=data.select(range(min(8, len(data)))),
        peft_config=adapter,
        callbacks=[FirstLog()],
    )
    clock = comparison.Clock()
    with clock.running():
        trainer.train()
    found = comparison.measured(clock) | {
        "first_ratio": None,
        "ratio": logged["val/ratio"],
        "kl": logged["objective/kl"],
    }
    result.write_text(json.dumps(found | {"metrics": logged}), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
