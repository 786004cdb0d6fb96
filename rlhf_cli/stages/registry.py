"""The stages of the pipeline in order, one line per stage. Modules are imported on demand."""

from __future__ import annotations

import importlib
from typing import Any

from rlhf_cli.stages.base import Stage

REGISTRY: dict[str, tuple[str, str]] = {
    "sft": ("rlhf_cli.stages.sft.stage", "Fine-tune the base model on demonstrations."),
    "label": ("rlhf_cli.stages.label.stage", "Sample completions and rank them, or import rankings."),
    "train-rm": ("rlhf_cli.stages.reward_model.stage", "Train a reward model on rankings or preferences."),
    "ppo": ("rlhf_cli.stages.ppo.stage", "Train the policy with PPO and a KL penalty to the SFT model."),
    "evaluate": (
        "rlhf_cli.stages.evaluate.stage",
        "Compare a policy with a baseline, by default PPO with SFT, on held-out prompts.",
    ),
    "best-of-n": ("rlhf_cli.stages.best_of_n.stage", "Measure the best of n completions of held-out prompts."),
}
"""Name of a stage and its command -> module that defines `STAGE`, and the line that `rlhf --help` shows."""


def stage(name: str) -> Stage[Any, Any]:
    """Return a stage's declaration."""
    return importlib.import_module(REGISTRY[name][0]).STAGE


def stages() -> list[Stage[Any, Any]]:
    """Return all declarations in pipeline order."""
    return [stage(name) for name in REGISTRY]
