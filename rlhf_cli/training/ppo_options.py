"""Settings of the PPO loop as plain values; the recipe's `ppo` section documents each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PPOOptions:
    """See `recipe.schema.PPOSettings`, whose names and units these are."""

    steps: int
    prompts_per_step: int
    samples_per_prompt: int
    epochs: int
    minibatches: int
    micro_batch_size: int
    rollout_batch_size: int
    temperature: float
    max_new_tokens: int
    learning_rate: float
    critic_learning_rate: float | None
    schedule: Literal["constant", "linear", "cosine"]
    max_grad_norm: float
    clip_range: float
    value_clip_range: float
    value_coef: float
    gamma: float
    gae_lambda: float
    whiten_advantages: bool
    whiten_rewards: bool
    kl_coef: float
    kl_target: float | None
    kl_horizon: float
    kl_estimator: Literal["k1", "k3"]
    missing_eos_reward: float | None
    reward_clip: float | None
    checkpoint_steps: int

    @property
    def answers_per_step(self) -> int:
        """Answers sampled in one step."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def optimizer_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps * self.epochs * self.minibatches
