"""Small inputs for the stages, and the settings that make every stage take seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORDS = ("the", "cat", "sat", "on", "a", "warm", "stone", "and", "watched", "how", "bread", "is", "baked", "near", "it")
PROMPTS = [f"{WORDS[n % 15]} {WORDS[n * 7 % 13]} {n}" for n in range(9)]
# A reward that interrupts the stage once, as a user would, where a file `interrupt` asks for it.
GOLD = """
import os, pathlib, signal

def score(prompts, completions):
    if (flag := pathlib.Path("interrupt")).exists():
        flag.unlink()
        os.kill(os.getpid(), signal.SIGTERM)
    return [completion.count("e") - abs(len(completion) - 12) / 8 for completion in completions]
"""
ROWS = {
    "prompts": [{"prompt": prompt} for prompt in PROMPTS],
    "demonstrations": [{"prompt": prompt, "completion": f" {WORDS[len(prompt) % 15]}" * 2} for prompt in PROMPTS],
    "rankings": [{"prompt": prompt, "chosen": " sat on it", "rejected": " no"} for prompt in PROMPTS],
}
SETTINGS: dict[str, Any] = {
    "model.precision": "float32",
    "data.holdout": 0.35,
    "data.max_skip": 0.5,
    "sampling.max_new_tokens": 6,
    "sft.batch_size": 4,
    "sft.learning_rate": 1e-3,
    "label.by": "function",
    "label.function": "gold.py:score",
    "label.completions_per_prompt": 2,
    "train_rm.batch_size": 4,
    "train_rm.learning_rate": 1e-3,
    "ppo.steps": 2,
    "ppo.prompts_per_step": 4,
    "ppo.epochs": 1,
    "ppo.checkpoint_steps": 1,
    "ppo.learning_rate": 1e-3,
    "evaluate.judge_function": "gold.py:score",
}


def write_inputs(folder: Path) -> Path:
    """Write data files and a reward function into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "gold.py").write_text(GOLD)
    return folder


def options(stages: str, changes: Mapping[str, Any] | None = None) -> list[str]:
    """Return `--set` options: the settings above for some stages, such as `sft ppo`, and changes.

    Args:
        stages: sections of the recipe that the command has, besides those that all commands have.
        changes: settings to add or replace.
    """
    sections = {"model", "data", "sampling", *stages.replace("-", "_").split()}
    chosen = {name: value for name, value in SETTINGS.items() if name.split(".")[0] in sections} | dict(changes or {})
    return [part for name, value in chosen.items() for part in ("--set", f"{name}={_text(value)}")]


def recipe(model: Path, changes: Mapping[str, Any] | None = None) -> str:
    """Return a recipe with all stages, as YAML."""
    sections: dict[str, dict[str, Any]] = {"model": {"path": str(model)}, "data": {"prompts": "prompts.jsonl"}}
    given = {"sft.data": "demonstrations.jsonl", **SETTINGS, **(changes or {})}
    for name, value in given.items():
        section, setting = name.split(".")
        sections.setdefault(section, {})[setting] = value
    return json.dumps({"name": "gpu", "seed": 3, **sections})


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
