"""From one score per completion to one advantage per token: penalized rewards and generalized advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(scores: Tensor, kl: Tensor, is_completion: Tensor, *, kl_coef: float) -> Tensor:
    """Per-token reward r_t = -beta kl_t, plus the completion's score on its last real token.

    The last token is the end token where there is one, else the last one sampled: never the place behind it (trap 7 of
    docs/ppo.md). Summed over a completion this is r(x, y) - beta KL, the objective of InstructGPT, eq. 2.

    Args:
        scores: (B,) reward of each completion.
        kl: (B, T) nats.
        is_completion: (B, T) bool, True on the first n tokens of a row that has n >= 1.
        kl_coef: beta, reward per nat.

    Returns:
        (B, T), 0 where not real.
    """
    rewards = (-kl_coef * kl).masked_fill(~is_completion, 0.0)
    last = is_completion.sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.unsqueeze(1).to(rewards.dtype))


def generalized_advantages(
    rewards: Tensor, values: Tensor, is_completion: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2015, eq. 16) over completions that end with their last token.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lambda A_{t+1}; V and A are 0 behind the last real token.

    Args:
        rewards: (B, T).
        values: (B, T), V_t predicted before token t is seen.
        is_completion: (B, T) bool.
        gamma: discount a token.
        gae_lambda: 0 trusts the critic one token ahead, 1 uses the whole return.

    Returns:
        Advantages and returns (A + V), each (B, T), 0 where not real.
    """
    values = values.masked_fill(~is_completion, 0.0)
    rewards = rewards.masked_fill(~is_completion, 0.0)
    advantages = torch.zeros_like(values)
    following_value = following_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following_advantage = (delta + gamma * gae_lambda * following_advantage).masked_fill(~is_completion[:, t], 0.0)
        following_value = values[:, t]
        advantages[:, t] = following_advantage
    return advantages, advantages + values
