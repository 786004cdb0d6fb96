"""Settings of the PPO loop as plain values; the recipe's `ppo` section documents each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_cli.objectives.kl import KLEstimator
from rlhf_cli.objectives.shaping import RewardShape
from rlhf_cli.training.schedules import Schedule


@dataclass(frozen=True)
class PPOOptions:
    """See `recipe.ppo.PPOSettings`, whose names and units these are."""

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
    schedule: Schedule
    warmup_share: float
    max_grad_norm: float
    critic_warmup_steps: int
    clip_range: float
    value_clip_range: float | None
    value_coef: float
    entropy_coef: float
    gamma: float
    gae_lambda: float
    whiten_advantages: bool
    whiten_rewards: bool
    update_kl_limit: float | None
    ratio_limit: float
    kl_coef: float
    kl_in: Literal["reward", "loss"]
    kl_target: float | None
    kl_horizon: float
    kl_estimator: KLEstimator
    kl_stop: float | None
    kl_budget: float | None
    reward_scale: float | Literal["running"]
    reward_clip: float | None
    missing_eos_reward: float | None
    missing_eos_penalty: float
    length_penalty: float
    eval_steps: int | None
    eval_prompts: int
    show_steps: int | None
    shown_prompts: int
    checkpoint_steps: int
    keep_checkpoints: int
    ptx_coef: float = 0.0
    ptx_batch_size: int = 0

    @property
    def answers_per_step(self) -> int:
        """Answers sampled in one step, all processes together."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def optimizer_steps_per_step(self) -> int:
        """Optimizer steps of one step, unless its update ends early."""
        return self.epochs * self.minibatches

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps * self.optimizer_steps_per_step

    @property
    def shape(self) -> RewardShape:
        """How scores become rewards."""
        return RewardShape(self.reward_clip, self.missing_eos_reward, self.missing_eos_penalty, self.length_penalty)
