"""The `train_rm` section of a recipe."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from rlhf_cli.settings.base import (
    Count,
    DataName,
    Effort,
    ModelName,
    Positive,
)
from rlhf_cli.settings.shared import LoraSettings, TrainingSettings


class RewardModelSettings(TrainingSettings):
    """A reward model from rankings."""

    model: ModelName = None
    """RewardModel to start from: folder or hub id, decoder or encoder; null is what `sft` wrote."""
    data: DataName = None
    """Ranking or preference records; null is what `label` wrote."""
    learning_rate: Positive = 1e-4
    """Peak learning rate of AdamW."""
    batch_size: Count = 16
    """Prompts (ranked groups) in one optimizer step; all pairs of a prompt stay together."""
    micro_batch_size: Effort = 4
    """Prompts (ranked groups) in one forward and backward pass."""
    epochs: Positive = 1.0
    """RolloutTensors over the rankings. More than one overfits quickly (InstructGPT, appendix C.2)."""
    max_length: Count = 1024
    """Longest prompt plus answer in tokens; groups with a longer one are skipped and counted."""
    loss: Literal["pairwise", "plackett-luce"] = "pairwise"
    """`pairwise`: -log sigmoid(r_w - r_l), mean over all pairs of a group (InstructGPT, eq. 1); ties by cross-entropy
    at 1/2. `plackett-luce`: likelihood of the whole order, ties at any order within the tier."""
    use_margin: bool = False
    """Subtract a record's `margin` inside the sigmoid (Llama 2, eq. 2)."""
    adapter: Literal["lora", "none"] = "lora"
    """`lora` trains an adapter, which later stages share with the policy; `none` trains all weights."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    normalize: bool = True
    """Shift and scale rewards to mean 0 and standard deviation 1 over answers of the SFT model (the labeled answers of
    training prompts, where no SFT model is at hand)."""

    @model_validator(mode="after")
    def _margin_has_an_effect(self) -> Self:
        if self.use_margin and self.loss != "pairwise":
            raise ValueError("`use_margin` has no effect with `loss: plackett-luce`, which knows no margins")
        return self
