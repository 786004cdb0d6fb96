"""The gate behind `train_rm.require`: a run stops after a reward model that is not good enough. Imports no torch.

The reward model is finished by then. A run with lower requirements continues with it, without training it again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from rlhf_cli.errors import RequirementError
from rlhf_cli.stages.reward_model.settings import RewardModelSettings

_MAXIMA = frozenset({"calibration_error"})
"""Requirements that are a maximum; the others are a minimum."""

_SUBSETS = {
    "accuracy_longer_chosen": "no held-out pair has a longer preferred completion",
    "accuracy_shorter_chosen": "no held-out pair has a shorter preferred completion",
}


def check_requirements(settings: RewardModelSettings, metrics: Mapping[str, float | None], folder: Path) -> None:
    """Compare the metrics of a finished reward model with `train_rm.require`.

    Args:
        settings: section of the recipe.
        metrics: of the stage; `rm/NAME` is what the requirement NAME is about.
        folder: of the reward model, for messages.

    Raises:
        RequirementError: a requirement is not met, or its metric could not be computed.
    """
    failed: dict[str, str] = {}
    for name in type(settings.require).model_fields:
        limit, value = getattr(settings.require, name), metrics.get(f"rm/{name}")
        if limit is None:
            continue
        if value is None:
            failed[name] = f"{name} cannot be computed: {_SUBSETS.get(name, 'it is not among the metrics')}"
        elif value > limit if name in _MAXIMA else value < limit:
            word = "most" if name in _MAXIMA else "least"
            failed[name] = f"{name} is {_with_interval(name, value, metrics)}, and at {word} {limit:g} is required"
    if not failed:
        return
    relaxed = " ".join(f"--set train_rm.require.{name}={_reached(name, metrics)}" for name in failed)
    raise RequirementError(
        f"the reward model in {folder} does not meet `train_rm.require`: {'; '.join(failed.values())}",
        hint="label more prompts, or look for the cause in its `quality.json`; the reward model is kept: to continue "
        f"with it, without training again, relax the requirement, as in `{relaxed}`",
    )


def _reached(name: str, metrics: Mapping[str, float | None]) -> str:
    """Return a requirement that is met, rounded to that side; null where there is no value."""
    value = metrics.get(f"rm/{name}")
    if value is None:
        return "null"
    return f"{(math.ceil if name in _MAXIMA else math.floor)(value * 1000) / 1000:.3f}"


def _with_interval(name: str, value: float, metrics: Mapping[str, float | None]) -> str:
    low, high = metrics.get(f"rm/{name}_low"), metrics.get(f"rm/{name}_high")
    if low is None or high is None:
        return f"{value:.3f}"
    prompts = "" if name in _SUBSETS else f", {metrics.get('rm/prompts'):,.0f} prompts"
    return f"{value:.3f} ({low:.3f} to {high:.3f}{prompts})"
