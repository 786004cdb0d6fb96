"""The recipe: one frozen section a stage, plus what stages share. No torch, so that commands answer at once."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from rlhf_cli.settings.base import EffortOnly, Positive, Section
from rlhf_cli.settings.shared import (
    BuildSettings,
    DataSettings,
    LoraSettings,
    ModelSettings,
    SamplingSettings,
    TrackingSettings,
    Training,
)
from rlhf_cli.stages.evaluate.settings import EvaluateSettings
from rlhf_cli.stages.label.settings import LabelSettings
from rlhf_cli.stages.ppo.settings import PPORewardSettings, PPOSettings, PTXSettings
from rlhf_cli.stages.reward_model.settings import RewardModelSettings
from rlhf_cli.stages.sft.settings import SFTSettings

__all__ = [
    "BuildSettings",
    "DataSettings",
    "EvaluateSettings",
    "LabelSettings",
    "LoraSettings",
    "ModelSettings",
    "PPORewardSettings",
    "PPOSettings",
    "PTXSettings",
    "Recipe",
    "RewardModelSettings",
    "SFTSettings",
    "SamplingSettings",
    "TrackingSettings",
    "Training",
]


class Recipe(Section):
    """A run: the stages whose sections are present, in their order."""

    name: str = "default"
    """Names the run directory, `runs/NAME`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random."""
    model: ModelSettings = ModelSettings()
    """The base model."""
    data: DataSettings = DataSettings()
    """What the stages share about data."""
    tracking: TrackingSettings = TrackingSettings()
    """Where metrics go besides `metrics.jsonl`."""
    stall_seconds: Annotated[Positive | None, EffortOnly()] = None
    """A stage that makes no progress for so many seconds prints what it is doing and ends; null waits for ever."""
    sft: SFTSettings | None = None
    """Supervised fine-tuning."""
    label: LabelSettings | None = None
    """Sampling and labeling."""
    train_rm: RewardModelSettings | None = None
    """Reward model."""
    ppo: PPOSettings | None = None
    """PPO."""
    evaluate: EvaluateSettings | None = None
    """Evaluation."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError("expected letters, digits, `.`, `_` or `-`, starting with a letter or digit")
        return name

    @model_validator(mode="after")
    def _quantized_under_adapters(self) -> Self:
        for name in ("sft", "train_rm", "ppo") if self.model.quantize != "none" else ():
            section = getattr(self, name)
            if section is not None and section.adapter == "none":
                raise ValueError(
                    f"`model.quantize` holds frozen weights, and `{name}.adapter: none` trains all of them"
                )
        return self

    @model_validator(mode="after")
    def _buildable(self) -> Self:
        if self.model.build is not None and self.sft is None:
            raise ValueError("`model.build` makes an untrained model, which needs an `sft` section")
        if self.model.build is not None and self.model.build.architecture == "encoder-decoder":
            if self.train_rm is not None and self.train_rm.model is None:
                raise ValueError("an encoder-decoder cannot be a reward model: name another in `train_rm.model`")
            if self.sft is not None and self.sft.packing:
                raise ValueError("`sft.packing` is for decoders; an encoder-decoder reads one prompt a row")
        return self
