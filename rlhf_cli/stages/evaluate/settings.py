"""The `evaluate` section of a recipe."""

from __future__ import annotations

from typing import Literal

from rlhf_cli.settings.base import (
    Count,
    DataName,
    Effort,
    FunctionName,
    ModelName,
    NonNegative,
    StageSection,
)
from rlhf_cli.settings.shared import StageSamplingSettings


class EvaluateSettings(StageSection):
    """Comparison of a policy with a baseline on held-out prompts: by default of PPO's policy with the model that it
    started from."""

    baseline: ModelName = None
    """Model to compare with; null is `ppo.model` if given, else the output of `sft`."""
    policy: ModelName = None
    """Model to evaluate; null is the output of `ppo`."""
    reward_model: ModelName = None
    """Reward model whose mean reward is reported; null is the output of `train-rm`, else `ppo.reward_model`, else
    none."""
    prompts: DataName = None
    """Prompt records, all of which are used; null is the held-out share (`data.holdout`) of `data.prompts`."""
    trained_prompts: Literal["refuse", "skip", "use"] = "refuse"
    """What happens if policy or baseline was trained on some of the prompts: `refuse` ends the stage with their number,
    `skip` evaluates on the others, `use` evaluates on all."""
    judge_function: FunctionName = None
    """Function that scores completions and decides which model wins, as `file.py:function` or
    `package.module:function`. Null decides by the reward model; PPO was trained against it, so such a win shows that
    training worked, not that quality improved."""
    tie_margin: NonNegative = 0.0
    """Scores that differ by at most this much are a tie; a tie counts 1/2."""
    max_prompts: Count | None = None
    """Maximum number of prompts; null uses all."""
    samples_per_prompt: Count = 1
    """Completions per prompt from each model."""
    sampling: StageSamplingSettings = StageSamplingSettings()
    """How completions are sampled, of both models; null is how the policy was trained."""
    shown_samples: Effort = 5
    """Number of prompts whose completions are shown side by side in the terminal; all are saved."""
