"""The `evaluate` section of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlhf_cli.settings.base import (
    Count,
    DataName,
    Effort,
    FunctionName,
    ModelName,
    NonNegative,
    StageSection,
)
from rlhf_cli.settings.shared import SamplingSettings


class EvaluateSettings(StageSection):
    """SFT against PPO on prompts that no stage trained on."""

    baseline: ModelName = None
    """Model to compare with; null is what `sft` wrote."""
    policy: ModelName = None
    """Model under evaluation; null is what `ppo` wrote."""
    reward_model: ModelName = None
    """Reward model whose mean is reported; null is what `train-rm` wrote, else `ppo.reward_model`, else none."""
    prompts: DataName = None
    """Prompt records, all of which are used; null is the held-out share of `data.prompts`."""
    judge_function: FunctionName = None
    """Gold score that decides who wins, `package.module:function` or `file.py:function`; null judges by the reward
    model, which PPO was trained against, so read that as a check of training and not of quality."""
    tie_margin: NonNegative = 0.0
    """Scores that differ by at most this much are a tie, which counts 1/2."""
    max_prompts: Count | None = None
    """Use at most this many prompts; null uses all."""
    samples_per_prompt: Count = 1
    """Answers by each model to each prompt."""
    sampling: SamplingSettings = SamplingSettings()
    """How the answers are drawn. Compare at the temperature PPO trained at."""
    bootstrap: Annotated[int, Field(ge=100)] = 2_000
    """Resamples of prompts for the 95 % intervals."""
    shown_samples: Effort = 5
    """Prompts shown side by side in the terminal; all of them are saved."""
