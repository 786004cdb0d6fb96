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
from rlhf_cli.settings.shared import Adapter, LoraSettings, TrainingSettings, default_rate


class RewardModelSettings(TrainingSettings):
    """Training of a reward model on rankings."""

    model: ModelName = None
    """Model to start from, a folder or hub id of a decoder or encoder; null is the output of `sft`."""
    data: DataName = None
    """Ranking or preference records; null is the output of `label`."""
    learning_rate: Positive | None = None
    """Peak learning rate of AdamW; null is 1e-4 with `adapter: lora` and 1e-5 with `adapter: none`."""
    batch_size: Count = 16
    """Prompts (ranked groups) per optimizer step; all pairs of a prompt stay in the same step."""
    micro_batch_size: Effort = 4
    """Prompts (ranked groups) per forward and backward pass. Affects memory and speed, not the result."""
    epochs: Positive = 1.0
    """Passes over the rankings. More than one overfits quickly (InstructGPT, appendix C.2)."""
    max_length: Count = 1024
    """Maximum length of prompt plus completion in tokens; groups with a longer one are skipped and counted."""
    loss: Literal["pairwise", "plackett-luce"] = "pairwise"
    """`pairwise`: -log sigmoid(r_w - r_l), averaged over all pairs of a group (InstructGPT, eq. 1); ties use
    cross-entropy with target 1/2. `plackett-luce`: negative log-likelihood of the whole ranking, with any order within
    a tier."""
    use_margin: bool = False
    """Subtract the record's `margin` from the reward difference inside the sigmoid (Llama 2, eq. 2)."""
    adapter: Adapter = "lora"
    """`lora` trains an adapter that PPO can load on the policy's backbone; `none` trains all weights."""
    lora: LoraSettings = LoraSettings()
    """LoRA settings of the adapter, with `adapter: lora`."""
    normalize: bool = True
    """Shift and scale rewards to mean 0 and standard deviation 1 over completions of the SFT model, or over the labeled
    completions of training prompts if there is no SFT model."""

    @property
    def peak_rate(self) -> float:
        """See `TrainingSettings`."""
        return self.learning_rate or default_rate(self.adapter, lora=1e-4, full=1e-5)

    @model_validator(mode="after")
    def _margin_has_an_effect(self) -> Self:
        if self.use_margin and self.loss != "pairwise":
            raise ValueError("`use_margin` has no effect with `loss: plackett-luce`, which does not use margins")
        return self
