"""PPO's section."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf_cli.recipe.base import (
    Count,
    DataName,
    Effort,
    EffortFlag,
    ModelName,
    Names,
    NonNegative,
    Positive,
    Section,
    Share,
)
from rlhf_cli.recipe.shared import LoraSettings

_KL_HORIZON = 10_000.0


class RewardFunction(Section):
    """A reward computed by Python code."""

    function: Annotated[str, Names("function")]
    """`package.module:function` or `file.py:function`; see `label.function`."""
    weight: float = 1.0
    """Factor in the sum of rewards."""


class PPOSettings(Section):
    """Proximal policy optimisation against a reward, with a KL leash to the SFT model."""

    model: ModelName = None
    """Policy to start from and reference of the KL penalty; null is what `sft` wrote."""
    reward_model: ModelName = None
    """Folder or hub id of the reward model; null is what `train-rm` wrote, or none if `reward_functions` are given."""
    reward_functions: list[RewardFunction] = Field(default=[])
    """Rewards by Python code, added to the reward model's."""
    prompts: DataName = None
    """Prompt records; null is `data.prompts`."""

    steps: Count = 100
    """Rollouts, each followed by `epochs` of updates."""
    prompts_per_step: Count = 64
    """Prompts sampled in one step."""
    samples_per_prompt: Count = 1
    """Answers to each of them."""
    epochs: Count = 4
    """Passes over one step's answers."""
    minibatches: Count = 1
    """Optimiser steps in one pass."""
    micro_batch_size: Effort = 8
    """Answers in one forward and backward pass. Changes memory and speed, never the result."""
    rollout_batch_size: Effort = 64
    """Answers generated at once. Changes memory and speed only."""

    temperature: Positive = 1.0
    """Logits are divided by this in sampling and in every log-probability."""
    max_new_tokens: Count = 128
    """Longest answer in tokens."""

    learning_rate: Positive = 1e-5
    """Peak learning rate of the policy's AdamW (epsilon 1e-5)."""
    critic_learning_rate: Positive | None = None
    """Peak learning rate of the critic; null is `learning_rate`."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate over the run; `linear` falls to zero."""
    max_grad_norm: Positive = 1.0
    """The gradient of policy and critic together is scaled down to at most this norm."""

    clip_range: Positive = 0.2
    """Epsilon of the clipped surrogate (Schulman et al. 2017, eq. 7)."""
    value_clip_range: Positive = 0.2
    """How far a value may move from its rollout value before its loss is clipped, in reward."""
    value_coef: NonNegative = 0.1
    """Weight of the value loss beside the policy's; it decides the critic's part of the gradient norm."""
    gamma: Share = 1.0
    """Discount per token."""
    gae_lambda: Share = 0.95
    """Lambda of generalised advantage estimation (Schulman et al. 2015, eq. 16)."""
    whiten_advantages: bool = True
    """Shift and scale a step's advantages to mean 0, standard deviation 1 over its tokens."""
    whiten_rewards: bool = False
    """Scale a step's per-token rewards to standard deviation 1, keeping their mean. Harmful on TL;DR."""

    kl_coef: NonNegative = 0.05
    """Weight of the per-token KL penalty to the SFT model, in reward per nat. The start value, with `kl_target`."""
    kl_target: Positive | None = None
    """KL in nats per answer that an adaptive `kl_coef` steers to (Ziegler et al. 2019, section 2.2); null: fixed."""
    kl_horizon: Positive = _KL_HORIZON
    """Answers over which the adaptive coefficient moves."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Per-token estimate in the reward: k1 = log pi/ref, unbiased; k3 = ref/pi - 1 - log ref/pi, never negative."""
    missing_eos_reward: float | None = None
    """Replaces the reward of an answer that did not end with an end-of-text token; null leaves it."""
    reward_clip: Positive | None = None
    """Rewards are cut to +- this before the KL penalty; null does not cut."""

    adapter: Literal["lora", "none"] = "lora"
    """`lora`: one frozen backbone; policy, critic and reward are adapters on it. `none`: separate full models."""
    lora: LoraSettings = LoraSettings()
    """The policy's and the critic's adapter."""
    gradient_checkpointing: EffortFlag = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpoint_steps: Effort = 10
    """Steps between two checkpoints, from which a killed run goes on."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.prompts_per_step * self.samples_per_prompt < self.minibatches:
            raise ValueError("`minibatches` exceeds the answers of a step (`prompts_per_step` x `samples_per_prompt`)")
        if self.kl_target is None and self.kl_horizon != _KL_HORIZON:
            raise ValueError("`kl_horizon` has no effect without `kl_target`")
        if self.kl_target is not None and self.kl_horizon < self.prompts_per_step * self.samples_per_prompt:
            raise ValueError(
                "`kl_horizon` is below the answers of one step (`prompts_per_step` x `samples_per_prompt`): one step "
                "could turn `kl_coef` around"
            )
        if self.adapter == "none" and self.lora != LoraSettings():
            raise ValueError("`lora` has no effect with `adapter: none`")
        if self.adapter == "lora" and self.lora.dropout > 0:
            raise ValueError("`lora.dropout` must be 0: with dropout the first ratio of an update is not 1")
        return self
