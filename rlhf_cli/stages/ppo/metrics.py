"""The metrics of a PPO step, under TRL's names, over real tokens only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_cli.objectives.masking import masked_mean, masked_variance
from rlhf_cli.stages.ppo.forward_passes import Completions, RolloutTensors
from rlhf_cli.stages.ppo.update import UpdateStatistics


def rollout_metrics(
    completions: Completions, before: RolloutTensors, rewards: Tensor, *, kl_coef: float
) -> dict[str, float]:
    """Return the metrics of the completions of a step or of an evaluation.

    Args:
        completions: N completions with their raw scores.
        before: log-probabilities and values of their tokens.
        rewards: (N,) scores that are trained on.
        kl_coef: beta of this step.

    `objective/kl` is the mean over completions of the summed k1 estimate, in nats per completion, whatever estimator
    the penalty in the loss uses: k1 is unbiased.
    """
    is_completion = before.is_completion
    log_ratio = (before.logprobs - before.reference_logprobs).masked_fill(~is_completion, 0.0)
    kl = float(log_ratio.sum(dim=1).mean())
    entropy = before.entropy.masked_fill(~is_completion, 0.0).sum(dim=1)
    lengths = is_completion.sum(dim=1).float()
    parts = {f"objective/scores/{name}": float(scores.mean()) for name, scores in completions.parts.items()}
    return {
        "objective/scores": float(completions.scores.mean()),
        "objective/scores_std": float(completions.scores.std(correction=0)),
        **(parts if len(parts) > 1 else {}),
        "objective/kl": kl,
        "objective/kl_per_token": float(masked_mean(log_ratio, is_completion)),
        "objective/entropy": float(entropy.mean()),
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": float(rewards.mean()) - kl_coef * kl,
        "val/num_eos_tokens": float(sum(completions.finished)),
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
    }


def update_metrics(before: RolloutTensors, returns: Tensor, update: UpdateStatistics) -> dict[str, float]:
    """Return the metrics of the update of a step.

    Args:
        before: log-probabilities and values before it.
        returns: (N, T).
        update: its sums.
    """
    is_completion = before.is_completion
    per = "policy_tokens"
    ratio = update.mean("ratio", per)
    # 1 - var(R - V) / var(R): the fraction of the returns that the critic predicts.
    unexplained = masked_variance(returns - before.values, is_completion)
    explained = 1.0 - unexplained / masked_variance(returns, is_completion).clamp(min=1e-8)
    first_kl, _, first_ratio = update.epochs[0]
    metrics = {
        "policy/approxkl_avg": update.mean("approx_kl", per),
        "policy/clipfrac_avg": update.mean("clipped", per),
        "policy/entropy_avg": update.mean("entropy", per),
        "policy/grad_norm": _mean(update.policy_norms),
        "policy/epochs": float(len(update.epochs)),
        "policy/optimizer_steps": float(len(update.policy_norms)),
        "loss/policy_avg": update.mean("policy_loss", per),
        "loss/value_avg": update.mean("value_loss"),
        "val/grad_norm": _mean(update.critic_norms),
        "val/clipfrac_avg": update.mean("value_clipped"),
        "val/ratio": ratio,
        "val/ratio_var": max(update.mean("squared_ratio", per) - ratio**2, 0.0),
        "val/first_epoch_ratio": first_ratio,
        "val/first_epoch_approxkl": first_kl,
        "val/largest_log_ratio": update.worst.log_ratio,
        "val/explained_variance": float(explained),
        "skipped_steps": float(update.skipped_steps + update.ratio_skips),
    }
    if "ptx_loss" in update.sums:
        metrics["loss/ptx_avg"] = update.mean("ptx_loss", "ptx_tokens")
    if "kl_loss" in update.sums:
        metrics["loss/kl_avg"] = update.mean("kl_loss", per)
    return metrics


def _mean(values: Sequence[float]) -> float:
    """Return the mean; NaN without any."""
    return sum(values) / len(values) if values else math.nan


def histograms(completions: Completions) -> dict[str, list[float]]:
    """Return what is logged as a histogram: lengths of the completions in tokens, and their raw scores."""
    return {"length": completions.lengths.tolist(), "reward": completions.scores.tolist()}


def completion_kl(before: RolloutTensors) -> Tensor:
    """Return the summed k1 estimate of each completion: (N,) nats."""
    return (before.logprobs - before.reference_logprobs).masked_fill(~before.is_completion, 0.0).sum(dim=1)


def all_finite(scores: Tensor) -> bool:
    """Whether every reward is finite."""
    return bool(torch.isfinite(scores).all())


def note(metrics: dict[str, float]) -> str:
    """Return the metrics that matter most, short enough for the progress bar."""
    return (
        f"reward {metrics['objective/scores']:.2f}  kl {metrics['objective/kl']:z.1f}  "
        f"len {metrics['length/mean']:.0f}  clip {metrics.get('policy/clipfrac_avg', math.nan):.2f}"
    )
