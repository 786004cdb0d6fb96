"""Compare the speed and memory of `rlhf sft` with TRL's SFTTrainer on the same demonstrations.

    python benchmarks/sft_vs_trl.py --model SmolLM2-135M-Instruct --data qa_demonstrations.jsonl
    python benchmarks/sft_vs_trl.py                                a tiny model and random words

Both take the same optimizer steps on the same token ids, with the loss of the completions alone, so their loss curves
are equal but for rounding; the table gives the largest difference.

Sides alternate, each in a process of its own, once per round. Timed is the training without loading: of `rlhf sft` the
training loop without its checkpoints, of TRL `trainer.train()`, which writes none here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import comparison


def main() -> int:
    """Run the rounds and print the tables; or, as the other side's process, train once."""
    if comparison.train_as_peer(peer):
        return 0
    parser = comparison.losses_parser(
        __doc__, file="qa_demonstrations.jsonl", unit="records", batch=16, micro_batch=8, learning_rate=2e-5
    )
    options = parser.parse_args()
    comparison.compare_losses(options, prepare, ours, script=__file__, title="SFT", unit="records")
    return 0


def prepare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Write the demonstrations, and their token ids in the order in which our side takes them."""
    from rlhf_cli.data.chat_format import PromptFormat
    from rlhf_cli.data.examples import tokenize
    from rlhf_cli.data.records import Demonstration
    from rlhf_cli.data.sources import read_records
    from rlhf_cli.models.loading import load_tokenizer
    from rlhf_cli.stages.sft.data import BatchPlan

    shape = comparison.SHAPES["tiny"]
    model = str(options.model or comparison.random_llama(work / "tiny", shape))
    source, template = comparison.language_model(model)
    tokenizer = load_tokenizer(source)
    form, count = PromptFormat(tokenizer, template, name=model), options.steps * options.batch
    if options.data is None:
        sides = [
            comparison.random_texts(count, size, vocabulary=len(tokenizer), seed=seed)
            for seed, size in enumerate(options.tokens)
        ]
        records = [Demonstration(*pair) for pair in zip(*sides, strict=True)]
    else:
        records = read_records(str(options.data), "demonstration").records
    both = ((record, tokenize(record, form, is_encoder_decoder=False, all_turns=True)) for record in records)
    chosen = [(record, example) for record, example in both if len(example) <= options.max_length][:count]
    if len(chosen) < count:
        sys.exit(f"{len(chosen)} demonstrations of at most {options.max_length} tokens; {count} are needed")
    lines = (json.dumps({"prompt": record.prompt, "completion": record.completion}) for record, _ in chosen)
    (work / "demonstrations.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plan = BatchPlan(count, 1.0, options.batch, 0)
    lengths = [len(example) for _, example in chosen]
    order = [number for step in range(plan.steps) for number in sorted(plan.rows_of(step), key=lengths.__getitem__)]
    examples = [chosen[number][1] for number in order]
    rows = [{"input_ids": one.ids, "completion_mask": list(map(int, one.is_trained()))} for one in examples]
    (work / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return {
        "name": Path(model).name,
        "model": model,
        "data": str(work / "demonstrations.jsonl"),
        "rows": str(work / "rows.json"),
        "pad_token": comparison.padding_token(tokenizer, []),
        "adapter": _adapter(model, work) if options.adapter == "lora" else None,
        "steps": options.steps,
        "batch": options.batch,
        "micro_batch": options.micro_batch,
        "learning_rate": options.learning_rate,
        "threads": options.threads,
        "max_length": options.max_length,
        "tokens": sum(map(len, examples)) / count,
        "output": str(work / "trl"),
        "changes": comparison.changes(options.set),
    }


def _adapter(model: str, work: Path) -> str:
    """Write the adapter that our side starts from."""
    from rlhf_cli.models.loading import load_policy
    from rlhf_cli.models.lora import add_lora
    from rlhf_cli.models.seeding import seeded
    from rlhf_cli.settings.shared import LoraSettings

    policy = load_policy(comparison.language_model(model)[0])
    with seeded(0, policy.device):
        add_lora(policy, LoraSettings())
    return comparison.write_adapter(policy, work / "adapter.safetensors")


def ours(runner: comparison.Runner, task: dict[str, Any], precision: str) -> comparison.Row:
    """Run `rlhf sft` once."""
    recipe = {
        "model": comparison.model_section(task["model"], precision, task["threads"]),
        "data": {"holdout": 0.0},
        "sft": comparison.stage_settings(task) | task["changes"],
    }
    found = runner.stage("sft", recipe)
    return found | {"losses": [row["loss"] for row in found.pop("rows")]}


def peer(task: dict[str, Any], result: Path) -> None:
    """Train once with TRL."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(task["threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(task["model"], dtype=comparison.peer_dtype(task))
    if task["adapter"] is not None:
        model = comparison.adapted(model, task["adapter"], task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    tokenizer.pad_token = task["pad_token"]
    rows = json.loads(Path(task["rows"]).read_text(encoding="utf-8"))
    trainer = SFTTrainer(
        model,
        SFTConfig(**comparison.trainer_settings(task), completion_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    comparison.train_peer(trainer, result)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
