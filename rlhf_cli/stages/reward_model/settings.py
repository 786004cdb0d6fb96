"""The `train_rm` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf_cli.settings.base import (
    Count,
    DataName,
    Effort,
    EffortOnly,
    ModelName,
    NonNegative,
    Positive,
    Section,
    Share,
)
from rlhf_cli.settings.shared import Adapter, LoraSettings, TrainingSettings, default_rate

NORMALIZED_OVER = 64
"""Training prompts that rewards are normalized over: enough for a mean and a deviation, in about a minute on a CPU."""


class RequiredQuality(Section):
    """What is required of the reward model on held-out prompts. It is trained, measured and written in any case; if a
    requirement is not met, the run then stops with exit code 78. Changing a requirement does not train it again."""

    accuracy: Annotated[Share | None, EffortOnly()] = None
    """Minimum accuracy (metric `rm/accuracy`); here and below, null requires nothing."""
    accuracy_low: Annotated[Share | None, EffortOnly()] = None
    """Minimum lower bound of the accuracy's 95 % interval; 0.5 requires more than chance."""
    accuracy_longer_chosen: Annotated[Share | None, EffortOnly()] = None
    """Minimum accuracy on pairs whose preferred completion is the longer one."""
    accuracy_shorter_chosen: Annotated[Share | None, EffortOnly()] = None
    """Minimum accuracy on pairs whose preferred completion is the shorter one."""
    calibration_error: Annotated[Share | None, EffortOnly()] = None
    """Maximum expected calibration error."""


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
    center_coef: NonNegative = 0.0
    """Weight of (r_i + r_j)^2, averaged over the pairs of a group: keeps rewards around 0, which ranking losses do not
    (Eisenstein et al. 2023, arXiv:2312.09244, eq. 2). TRL recommends 0.01."""
    batch_sum_coef: NonNegative = 0.0
    """Weight of the squared mean reward of an optimizer step: batch-wise sum-to-zero regularization (Hong et al. 2025,
    arXiv:2505.07271), whose lambda is this divided by `batch_size`. Needs one more forward pass per step."""
    eval_steps: Count | None = None
    """Optimizer steps between evaluations of the held-out loss and accuracy, which also follow the last step; null does
    not evaluate while training."""
    keep_best: Literal["none", "loss", "accuracy"] = "loss"
    """Which of the weights evaluated every `eval_steps` are written: those with the lowest held-out loss, with the
    highest accuracy, or, with `none`, the last. Half of the held-out prompts select the weights; the metrics of the
    finished reward model are measured on the other half."""
    adapter: Adapter = "lora"
    """`lora` trains an adapter that PPO can load on the policy's backbone; `none` trains all weights."""
    lora: LoraSettings = LoraSettings()
    """LoRA settings of the adapter, with `adapter: lora`."""
    normalize: bool = True
    """Shift and scale rewards to mean 0 and standard deviation 1 over completions of the SFT model, or over the labeled
    completions of training prompts if there is no SFT model."""
    members: Count = 1
    """Train an ensemble of this many reward models, with different seeds for head, adapter and order of the data. `ppo`
    combines their rewards by `ppo.reward_combination`; metrics are reported for the mean of their rewards."""
    data_curve: list[Annotated[float, Field(gt=0.0, lt=1.0)]] = Field(default=[])
    """Shares of the training prompts, such as `[0.25, 0.5]`: for each, a further reward model is trained on them and
    measured, to see what more labels would bring. These models are not kept."""
    require: RequiredQuality = RequiredQuality()
    """What is required of the reward model before later stages use it."""

    @property
    def peak_rate(self) -> float:
        """See `TrainingSettings`."""
        return self.learning_rate or default_rate(self.adapter, lora=1e-4, full=1e-5)

    @property
    def chooses(self) -> bool:
        """Whether held-out prompts choose the weights that are written."""
        return self.eval_steps is not None and self.keep_best != "none"

    @model_validator(mode="after")
    def _best_has_an_effect(self) -> Self:
        if self.eval_steps is None and self.changed("keep_best"):
            raise ValueError("`keep_best` has no effect without `eval_steps`")
        return self

    @model_validator(mode="after")
    def _margin_has_an_effect(self) -> Self:
        if self.use_margin and self.loss != "pairwise":
            raise ValueError("`use_margin` has no effect with `loss: plackett-luce`, which does not use margins")
        return self
