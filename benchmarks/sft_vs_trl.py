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
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import comparison


def main() -> int:
    """Run the rounds and print the tables; or, as the other side's process, train once."""
    if sys.argv[1:2] == ["--as-peer"]:
        peer(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), Path(sys.argv[3]))
        return 0
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        runner = comparison.Runner(Path(folder), options.threads, options.train_only)
        task = prepare(options, runner.work)
        sides = {f"rlhf {one}": partial(ours, runner, task, one) for one in options.precision}
        sides |= {f"TRL {one}": partial(theirs, runner, task, one) for one in options.precision}
        results = comparison.alternate(sides, options.pairs)
    title = (
        f"SFT, {options.name or task['name']}, adapter: {options.adapter}, {options.steps} steps of {options.batch} "
        f"records, {options.micro_batch} per micro-batch, {task['tokens']:.0f} tokens per record"
    )
    report = comparison.report(
        title, results, unit="records", count=options.steps * options.batch, threads=task["threads"]
    )
    comparison.publish(report, results, options.json)
    return 0


def _options() -> argparse.Namespace:
    parser = comparison.parser(__doc__, adapter="none")
    parser.add_argument(
        "--data", type=Path, default=comparison.shared_data("qa_demonstrations.jsonl"), help="demonstrations"
    )
    parser.add_argument("--random", action="store_true", help="random words instead of `--data`")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=16, help="records per optimizer step")
    parser.add_argument("--micro-batch", type=int, default=8, help="records per forward and backward pass")
    parser.add_argument("--max-length", type=int, default=512, help="longer records are skipped")
    parser.add_argument("--tokens", type=int, nargs=2, default=[32, 32], help="of random prompts and completions")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    options = parser.parse_args()
    options.data = None if options.random else options.data
    return options


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
    settings = {
        "data": task["data"],
        "batch_size": task["batch"],
        "micro_batch_size": task["micro_batch"],
        "max_length": task["max_length"],
        "learning_rate": task["learning_rate"],
        "schedule": "constant",
        "warmup_share": 0.0,
        "adapter": "none" if task["adapter"] is None else "lora",
    }
    recipe = {
        "model": comparison.model_section(task["model"], precision, task["threads"]),
        "data": {"holdout": 0.0},
        "sft": settings | task["changes"],
    }
    found = runner.stage("sft", recipe)
    return found | {"losses": [row["loss"] for row in found.pop("rows")]}


def theirs(runner: comparison.Runner, task: dict[str, Any], precision: str) -> comparison.Row:
    """Run TRL's trainer once, in this environment: it is the pinned version."""
    return runner.peer(__file__, task | {"precision": precision})


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
