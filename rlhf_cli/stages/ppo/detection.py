"""The detectors in PPO: what they see of a step and of the rewards, and the error that stops a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_cli.data.records import prompt_text
from rlhf_cli.errors import DetectorStopError
from rlhf_cli.quoting import word
from rlhf_cli.stages.ppo.forward_passes import Completions, RolloutTensors
from rlhf_cli.stages.ppo.metrics import completion_kl
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.stages.ppo.state import RunState
from rlhf_cli.training.checkpoint.names import STEP, checkpoint_folder
from rlhf_cli.training.monitoring.detectors.detectors import Detectors, Rewards
from rlhf_cli.training.monitoring.detectors.observation import Observation


def observation(step: int, completions: Completions, before: RolloutTensors, metrics: dict[str, float]) -> Observation:
    """Return what the detectors see of a step.

    Args:
        step: 1-based.
        completions: with finite scores.
        before: log-probabilities before the update.
        metrics: of the step.
    """
    return Observation(
        step=step,
        prompts=[prompt_text(prompt) for prompt in completions.prompts],
        texts=completions.texts,
        lengths=completions.lengths.tolist(),
        scores=completions.scores.tolist(),
        kl=completion_kl(before).tolist(),
        parts={name: scores.tolist() for name, scores in completions.parts.items()},
        metrics=metrics,
    )


def watched_rewards(
    settings: PPOSettings, weights: Mapping[str, float], *, reward_model: str | None, held_out: int
) -> Rewards:
    """Return what the detectors know of the rewards.

    Args:
        settings: section `ppo` of the recipe.
        weights: reward -> weight, the reward model first.
        reward_model: its folder; None without one.
        held_out: number of held-out prompts.
    """
    return Rewards(
        weights=weights,
        is_ensemble=settings.reward_combination != "sum",
        model=next(iter(weights)),
        model_range=None if reward_model is None else _measured_range(Path(reward_model)),
        held_out=min(settings.eval_prompts, held_out),
    )


def _measured_range(folder: Path) -> tuple[float, float] | None:
    """Return the range of rewards of the held-out rankings, from the manifest of `train-rm`; None without it."""
    try:
        metrics: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())["metrics"]
        return float(metrics["rm/lowest"]), float(metrics["rm/highest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stop_error(detectors: Detectors, state: RunState, settings: PPOSettings, work: Path) -> DetectorStopError | None:
    """Return the error of a run that a detector stops, or None.

    Args:
        detectors: of the run.
        state: after the last step.
        settings: section `ppo` of the recipe.
        work: folder of the checkpoints.
    """
    watched, passed = state.detectors, detectors.stopping(state.detectors)
    if passed is None:
        return None
    detector, threshold = passed
    setting = f"ppo.detectors.{detector.name}.stop"
    kept = ""
    if watched.safe_step is not None:
        folder = checkpoint_folder(work, STEP, watched.safe_step)
        kept = f"; the last checkpoint before a detector warned, of step {watched.safe_step:,}, is kept: {folder}"
    best = (
        "" if state.best is None else f"; the best policy within `kl_budget`, of step {state.best.step:,}, is kept too"
    )
    return DetectorStopError(
        f"ppo: the detector `{detector.name}` stopped the run after step {watched.step:,} of {settings.steps:,}: "
        f"{watched.seen[detector.name]} (`{setting}: {threshold:g}`){kept}{best}",
        hint=f"{detector.change[0]}; `rlhf diagnose {word(work.parent)}` quotes completions; to resume from here, "
        f"repeat the command with `--set {setting}=null` or a threshold beyond {watched.value[detector.name]:.3g}",
    )
