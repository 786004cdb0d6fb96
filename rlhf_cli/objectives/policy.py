"""PPO's two losses, each summed over real tokens with the sums its metrics are made of.

Sums, not means: the trainer divides by the tokens of the whole minibatch, across micro-batches and processes, so that
splitting the work differently changes nothing (trap 2 of docs/ppo.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_cli.objectives.masking import masked_sum


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped surrogate and what it says of the update; every field is a sum over real tokens.

    Attributes:
        loss: carries the gradient.
        approx_kl: (log ratio)^2 / 2, an estimate of KL(old || new) in nats.
        clipped: tokens whose clipped term was the smaller.
        ratio: probability ratio new / old.
        squared_ratio: its square, for the variance.
        largest_log_ratio: not a sum: the largest |log ratio| of each completion, (B,) nats.
        largest_position: not a sum: the token where it is, (B,).
    """

    loss: Tensor
    approx_kl: Tensor
    clipped: Tensor
    ratio: Tensor
    squared_ratio: Tensor
    largest_log_ratio: Tensor
    largest_position: Tensor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, is_completion: Tensor, *, clip_range: float
) -> PolicyLoss:
    """Clipped surrogate of PPO (Schulman et al. 2017, eq. 7), negated, summed over response tokens.

    Args:
        logprobs: (B, T) nats, under the policy being trained; carries gradient.
        old_logprobs: (B, T) nats, under the policy that sampled; constant.
        advantages: (B, T); constant.
        is_completion: (B, T) bool, True on sampled tokens up to and including the end token.
        clip_range: epsilon of eq. 7.
    """
    # Padding may hold anything; zero before the exponential keeps its gradient and value out.
    log_ratio = (logprobs - old_logprobs.detach()).masked_fill(~is_completion, 0.0)
    advantages = advantages.detach().masked_fill(~is_completion, 0.0)
    ratio = log_ratio.exp()
    unclipped = advantages * ratio
    clipped = advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -masked_sum(torch.minimum(unclipped, clipped), is_completion)
    with torch.no_grad():
        largest, position = log_ratio.abs().max(dim=1)
        return PolicyLoss(
            loss=loss,
            approx_kl=masked_sum(0.5 * log_ratio**2, is_completion),
            clipped=((clipped < unclipped) & is_completion).sum(),
            ratio=masked_sum(ratio, is_completion),
            squared_ratio=masked_sum(ratio**2, is_completion),
            largest_log_ratio=largest,
            largest_position=position,
        )


def truncated_importance_weights(
    logprobs: Tensor, sampler_logprobs: Tensor, is_completion: Tensor, *, cap: float
) -> Tensor:
    """Truncated importance weights min(pi(y_t) / mu(y_t), C) of sampled tokens (Ionides 2008, "Truncated importance
    sampling"): (B, T), constant, 1 on padding.

    Tokens were drawn from mu, which an inference engine computes, and their expectation is wanted under pi, which the
    training computes from the same weights. The policy loss of each token is multiplied by its weight. A weight is not
    negative, so this is the same as multiplying the token's advantage.

    Args:
        logprobs: (B, T) nats, log pi.
        sampler_logprobs: (B, T) nats, log mu.
        is_completion: (B, T) bool.
        cap: C, at least 1.
    """
    log_ratio = (logprobs - sampler_logprobs).detach().masked_fill(~is_completion, 0.0)
    return log_ratio.exp().clamp(max=cap)


@dataclass(frozen=True)
class ValueLoss:
    """The critic's loss; every field is a sum over real tokens.

    Attributes:
        loss: carries the gradient.
        clipped: tokens whose clipped error was the larger.
    """

    loss: Tensor
    clipped: Tensor


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, is_completion: Tensor, *, clip_range: float | None
) -> ValueLoss:
    """Clipped squared error of the critic, max((V - R)^2, (clip(V, V_old +- epsilon) - R)^2) / 2, summed.

    The form of OpenAI's baselines, which summarize-from-feedback uses.

    Args:
        values: (B, T), being trained; carries gradient.
        old_values: (B, T), at the time of the rollout; constant.
        returns: (B, T) advantages plus old values; constant.
        is_completion: (B, T) bool.
        clip_range: epsilon, how far a value may move from its old one before its loss is clipped, in reward; None is
            the plain squared error.
    """
    values = values.masked_fill(~is_completion, 0.0)
    old_values = old_values.detach().masked_fill(~is_completion, 0.0)
    returns = returns.detach().masked_fill(~is_completion, 0.0)
    if clip_range is None:
        return ValueLoss(0.5 * masked_sum((values - returns) ** 2, is_completion), torch.zeros_like(returns[0, 0]))
    near_old = torch.maximum(torch.minimum(values, old_values + clip_range), old_values - clip_range)
    error, clipped_error = (values - returns) ** 2, (near_old - returns) ** 2
    loss = 0.5 * masked_sum(torch.maximum(error, clipped_error), is_completion)
    return ValueLoss(loss, ((clipped_error > error) & is_completion).sum())
