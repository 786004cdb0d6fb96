"""Sections of the stages, but for PPO's."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf_cli.recipe.base import Count, DataName, Effort, FunctionName, ModelName, Names, NonNegative, Positive, Section
from rlhf_cli.recipe.shared import LoraSettings, SamplingSettings, Training


class SFTSettings(Training):
    """Supervised fine-tuning on demonstrations."""

    data: Annotated[str, Names("data")]
    """Demonstration records: a file, a folder or a hub data set."""
    learning_rate: Positive = 2e-4
    """Peak learning rate of AdamW. LoRA takes about ten times that of full fine-tuning."""
    batch_size: Count = 32
    """Records in one optimiser step (packed sequences, with `packing`)."""
    epochs: Positive = 1.0
    """Passes over the demonstrations."""
    max_length: Count = 1024
    """Longest sequence in tokens; records that are longer are skipped and counted."""
    packing: bool = False
    """Fill sequences of `max_length` tokens with several records each. Decoder-only models."""
    adapter: Literal["lora", "none"] = "lora"
    """`lora` trains an adapter and merges it; `none` trains all weights."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    lm_coef: NonNegative = 0.0
    """Weight lambda of the language-modelling loss on the whole sequence in L3 = L2 + lambda L1 (GPT-1, section
    3.2); L2 is the loss on the completion alone."""


class TrainRMSettings(Training):
    """A reward model from rankings."""

    model: ModelName = None
    """Scorer to start from: folder or hub id, decoder or encoder; null is what `sft` wrote."""
    data: DataName = None
    """Ranking or preference records; null is what `label` wrote."""
    learning_rate: Positive = 1e-4
    """Peak learning rate of AdamW."""
    batch_size: Count = 16
    """Prompts (ranked groups) in one optimiser step; all pairs of a prompt stay together."""
    micro_batch_size: Effort = 4
    """Prompts (ranked groups) in one forward and backward pass."""
    epochs: Positive = 1.0
    """Passes over the rankings. More than one overfits quickly (InstructGPT, appendix C.2)."""
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
    normalise: bool = True
    """Shift and scale rewards to mean 0 and standard deviation 1 over answers of the SFT model (the labelled answers of
    training prompts, where no SFT model is at hand)."""

    @model_validator(mode="after")
    def _margin_has_an_effect(self) -> Self:
        if self.use_margin and self.loss != "pairwise":
            raise ValueError("`use_margin` has no effect with `loss: plackett-luce`, which knows no margins")
        return self


class EvaluateSettings(Section):
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
