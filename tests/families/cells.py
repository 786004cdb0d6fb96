"""Takes a tiny model of one family through the real commands: `sft`, `train-rm`, `ppo` (two steps) and `evaluate`."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from rlhf_cli.errors import ModelError
from rlhf_cli.models.loading import ModelSource, load_config, load_policy
from tests.families.zoo import ENCODERS, save_tiny

STAGES = ("sft", "train-rm", "ppo", "evaluate")
YES, NOT_APPLICABLE = "yes", "n/a"
_REFUSED = "refused: "

_SETTINGS = {
    "model.precision": "float32",
    "model.threads": "1",
    "data.holdout": "0.3",
    "data.max_prompt_tokens": "40",
    "sampling.max_new_tokens": "8",
    "sft.epochs": "1",
    "sft.batch_size": "4",
    "sft.lora": "{rank: 4, alpha: 8}",
    "train_rm.epochs": "1",
    "train_rm.batch_size": "4",
    "train_rm.lora": "{rank: 4, alpha: 8}",
    "ppo.steps": "2",
    "ppo.prompts_per_step": "4",
    "ppo.epochs": "1",
    "ppo.adapter": "none",
    "evaluate.trained_prompts": "skip",
}
_WORDS = ("bread", "the sky", "a cat", "stone and water", "oven", "France")
_PROMPTS = [f"What is {word} {'again ' * (number % 3)}{number}?" for number in range(2) for word in _WORDS]
_ROWS = {
    "demos": [{"prompt": text, "completion": f" {text[8:14]} is good."} for text in _PROMPTS],
    "rankings": [{"prompt": text, "chosen": " It is good.", "rejected": " No, bad"} for text in _PROMPTS],
    "prompts": [{"prompt": text} for text in _PROMPTS],
}


_GOLD = "def score(prompts, completions):\n    return [text.count('e') for text in completions]\n"


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit status and what it printed to stderr."""

    code: int
    messages: str


def run_command(folder: Path, *arguments: object) -> Ended:
    """Run the `rlhf` command in this process, in `folder`."""
    from rlhf_cli.cli import main

    stage, err = str(arguments[0]), io.StringIO()
    sections = (stage.replace("-", "_"), "data", "model", "sampling")
    options = [
        part
        for name, value in _SETTINGS.items()
        if name.split(".")[0] in sections
        for part in ("--set", f"{name}={value}")
    ]
    with (
        mock.patch("rlhf_cli.training.monitoring.plots.draw_curves"),
        mock.patch("rlhf_cli.stages.reward_model.quality.draw_quality"),
        mock.patch.object(sys, "argv", ["rlhf", *map(str, arguments), "--run-dir", "run", *options]),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(err),
    ):
        code = main()
    return Ended(code, err.getvalue())


def cells_of(family: str, tokenizer, folder: Path) -> dict[str, str]:
    """Run the stages of a family: stage -> `yes`, `refused: reason` or `n/a`.

    Raises:
        AssertionError: a command failed in another way than by a refusal, or transformers reads another model from what
            a stage wrote.
    """
    for name, rows in _ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "gold.py").write_text(_GOLD, encoding="utf-8")
    model = save_tiny(family, tokenizer, folder / "model")
    if family in ENCODERS:
        cell = _cell(run_command(folder, "train-rm", "--model", model, "--data", "rankings.jsonl"), folder)
        return dict.fromkeys(STAGES, NOT_APPLICABLE) | {"train-rm": cell}
    cells = {"sft": _cell(run_command(folder, "sft", "--model", model, "--data", "demos.jsonl"), folder)}
    start = folder / "run" / "sft" if cells["sft"] == YES else model
    cells["train-rm"] = _cell(run_command(folder, "train-rm", "--model", start, "--data", "rankings.jsonl"), folder)
    has_reward = cells["train-rm"] == YES
    reward = ("--reward-model", folder / "run" / "train-rm") if has_reward else ("--function", "gold.py:score")
    data = (*reward, "--prompts", "prompts.jsonl")
    cells["ppo"] = _cell(run_command(folder, "ppo", "--model", start, *data), folder)
    policy = folder / "run" / "ppo" if cells["ppo"] == YES else start
    cells["evaluate"] = _cell(run_command(folder, "evaluate", "--baseline", start, "--policy", policy, *data), folder)
    for stage in ("sft", "ppo"):
        if cells[stage] == YES:
            assert (off := difference_from_transformers(folder / "run" / stage)) < 1e-3, (stage, off)
    return cells


def _cell(ended: Ended, folder: Path) -> str:
    if ended.code == 0:
        return YES
    lines = ended.messages.splitlines()
    error = next((line for line in lines if line.startswith("error: ")), None)
    assert error is not None, ended.messages
    assert ended.code == ModelError.exit_code, ended.messages
    reason = " ".join(" ".join(lines[lines.index(error) :]).split(" hint: ")[0].split())
    path = rf"`?{re.escape(str(folder))}/\S*?(?:model|sft)\b`?"
    reason = re.sub(f"model {path}", "model", reason.removeprefix("error: "))
    # How far two numbers are apart is not the same on all machines.
    reason = re.sub(r" \(`[\w.]+`\)$", "", reason)  # the setting, where the model is refused before the stage
    return _REFUSED + re.sub(r" \([^()]*differ by [^()]*\)", "", re.sub(path, "the model", reason))


@torch.no_grad()
def difference_from_transformers(folder: Path) -> float:
    """Largest difference of log-probabilities between our loader's model and that of transformers, in nats."""
    source = ModelSource(str(folder))
    config = load_config(source)
    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText)
    if config.is_encoder_decoder:
        kinds = (AutoModelForSeq2SeqLM,)
    kind = next(kind for kind in kinds if type(config) in kind._model_mapping)
    theirs, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"], report["missing_keys"]
    ids = torch.tensor([[5, 9, 40, 77, 12, 200, 33]])
    inputs = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    found = [model(input_ids=ids, **inputs).logits.log_softmax(-1) for model in (load_policy(source), theirs.eval())]
    return float((found[0] - found[1]).abs().max())
