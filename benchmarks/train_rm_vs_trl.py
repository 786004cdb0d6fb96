"""Compare the speed and memory of `rlhf train-rm` with TRL's RewardTrainer on the same pairs.

    python benchmarks/train_rm_vs_trl.py --model SmolLM2-135M-Instruct --data qa_rankings.jsonl
    python benchmarks/train_rm_vs_trl.py                           a tiny model and random words

Both start from the same classifier and take the same optimizer steps on the same token ids, so their loss curves are
equal but for rounding; the table gives the largest difference. Ours reads a ranking of K completions as one group, the
prompt once. TRL reads its K(K - 1)/2 pairs, two sequences each. The loss of a group is the mean over its pairs, so
with the same groups in a micro-batch, the means are the same. Rankings with ties are skipped: TRL has none.

Sides alternate, each in a process of its own, once per round. Timed is the training without loading: of `rlhf train-rm`
the training loop without its checkpoints, of TRL `trainer.train()`, which writes none here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comparison

if TYPE_CHECKING:
    from rlhf_cli.data.records import Ranking
    from rlhf_cli.models.reward_model.model import RewardModel

HOLDOUT = 0.1
"""The stage needs a held-out ranking; it is measured after the time that counts."""


def main() -> int:
    """Run the rounds and print the tables; or, as the other side's process, train once."""
    if comparison.train_as_peer(peer):
        return 0
    parser = comparison.losses_parser(
        __doc__, file="qa_rankings.jsonl", unit="groups", batch=4, micro_batch=1, learning_rate=1e-5
    )
    parser.add_argument("--completions", type=int, default=4, help="K of random rankings")
    options = parser.parse_args()
    comparison.compare_losses(options, prepare, ours, script=__file__, title="Reward model", unit="groups")
    return 0


def prepare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Write the classifier, the rankings, and the pairs in the order in which our side takes their groups."""
    from rlhf_cli.models.loading import ModelSource
    from rlhf_cli.models.reward_model.loading import new_reward_model
    from rlhf_cli.settings.shared import LoraSettings
    from rlhf_cli.stages.reward_model.data import Batches, by_length, encode_group

    shape = comparison.SHAPES["tiny"]
    model = str(options.model or comparison.random_llama(work / "tiny", shape))
    source, template = comparison.language_model(model)
    start = comparison.write_classifier(model, work / "classifier", pad_token_id=comparison.spare_id(source))
    lora = LoraSettings() if options.adapter == "lora" else None
    reward_model = new_reward_model(ModelSource(str(start)), template=template, lora=lora, seed=0)
    train, held_out = choose(options, reward_model)
    records = [*train, *held_out]
    (work / "rankings.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in map(_record, records)), encoding="utf-8"
    )
    groups = [encode_group(reward_model, ranking) for ranking in train]
    batches = Batches(len(groups), options.batch, 1.0, 0)
    pairs = []
    for step in range(batches.steps):
        for group in (groups[number] for number in by_length(groups, batches.groups(step))):
            better = sorted(range(len(group.levels)), key=lambda index: group.levels[index])
            ids = [group.sequences[index].ids for index in better]
            pairs += [{"chosen_ids": first, "rejected_ids": second} for first, second in combinations(ids, 2)]
    (work / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    lengths = [len(sequence.ids) for group in groups for sequence in group.sequences]
    return {
        "name": Path(model).name,
        "model": str(start),
        "data": str(work / "rankings.jsonl"),
        "pairs": str(work / "pairs.json"),
        "pairs_per_group": len(pairs) // len(groups),
        "adapter": None if lora is None else comparison.write_adapter(reward_model.model, work / "adapter.safetensors"),
        "steps": batches.steps,
        "batch": options.batch,
        "micro_batch": options.micro_batch,
        "learning_rate": options.learning_rate,
        "threads": options.threads,
        "tokens": sum(lengths) / len(lengths),
        "max_length": options.max_length,
        "output": str(work / "trl"),
        "changes": comparison.changes(options.set),
    }


def choose(options: argparse.Namespace, reward_model: RewardModel) -> tuple[list[Ranking], list[Ranking]]:
    """Return the first rankings without ties that are short enough, and one of a held-out prompt."""
    from rlhf_cli.data.records import Ranking
    from rlhf_cli.data.sources import read_records
    from rlhf_cli.data.splits import Split
    from rlhf_cli.stages.reward_model.data import encode_group

    count, split = options.steps * options.batch, Split(HOLDOUT, 0)
    if options.data is None:
        k, (prompt, completion) = options.completions, options.tokens
        vocabulary = len(reward_model.format.tokenizer)
        prompts = comparison.random_texts(2 * count + 40, prompt, vocabulary=vocabulary)
        texts = iter(comparison.random_texts(k * len(prompts), completion, vocabulary=vocabulary, seed=1))
        order = tuple((index,) for index in range(k))
        rankings = [Ranking(one, tuple(next(texts) for _ in range(k)), order) for one in prompts]
    else:
        rankings = read_records(str(options.data), "ranking").records
        sizes = [len(one.completions) for one in rankings]
        usual = max(set(sizes), key=sizes.count)
        rankings = [one for one in rankings if len(one.tiers) == len(one.completions) == usual]
    train: list[Ranking] = []
    held_out: list[Ranking] = []
    for ranking in rankings:
        is_held_out = split.holds_out(ranking.prompt)
        if len(held_out) == 1 if is_held_out else len(train) == count:
            continue
        if encode_group(reward_model, ranking).longest <= options.max_length:
            (held_out if is_held_out else train).append(ranking)
    if len(train) < count or not held_out:
        sys.exit(
            f"{len(train)} rankings without ties to train on and {len(held_out)} held out; {count} and 1 are needed"
        )
    return train, held_out


def _record(ranking: Ranking) -> dict[str, Any]:
    return {"prompt": ranking.prompt, "completions": ranking.completions, "ranking": ranking.tiers}


def ours(runner: comparison.Runner, task: dict[str, Any], precision: str) -> comparison.Row:
    """Run `rlhf train-rm` once."""
    settings = comparison.stage_settings(task) | {"model": task["model"], "epochs": 1, "normalize": False}
    recipe = {
        "model": comparison.model_section(task["model"], precision, task["threads"]),
        "data": {"holdout": HOLDOUT, "split_seed": 0},
        "train_rm": settings | task["changes"],
    }
    found = runner.stage("train-rm", recipe)
    return found | {"losses": [row["loss"] for row in found.pop("rows")]}


def peer(task: dict[str, Any], result: Path) -> None:
    """Train once with TRL."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    torch.set_num_threads(task["threads"])
    model: Any = AutoModelForSequenceClassification.from_pretrained(task["model"], dtype=comparison.peer_dtype(task))
    if task["adapter"] is not None:
        model = comparison.adapted(model, task["adapter"], task_type="SEQ_CLS", modules_to_save=["score"])
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    rows = json.loads(Path(task["pairs"]).read_text(encoding="utf-8"))
    settings = comparison.trainer_settings(task, rows_per_record=task["pairs_per_group"])
    trainer = RewardTrainer(
        model,
        RewardConfig(**settings, disable_dropout=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    comparison.train_peer(trainer, result)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
