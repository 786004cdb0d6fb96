"""What a PPO step reports, under TRL's names, over real tokens only."""

from __future__ import annotations

from torch import Tensor

from rlhf_cli.objectives.masking import masked_mean, masked_variance
from rlhf_cli.rollout.experience import Answers, Passes
from rlhf_cli.training.ppo_update import UpdateStatistics


def step_metrics(
    answers: Answers, before: Passes, scores: Tensor, returns: Tensor, update: UpdateStatistics, *, kl_coef: float
) -> dict[str, float]:
    """Metrics of one step.

    Args:
        answers: N answers with their scores as given.
        before: the passes before the update.
        scores: (N,) scores as trained on.
        returns: (N, T).
        update: sums of the update.
        kl_coef: beta of this step.

    `objective/kl` is the mean over answers of the summed k1 estimate, in nats per answer, whatever estimator the reward
    uses: it is the one with the smallest bias of the sequence's KL.
    """
    is_response = before.is_response
    log_ratio = (before.logprobs - before.reference_logprobs).masked_fill(~is_response, 0.0)
    kl = log_ratio.sum(dim=1)
    entropy = before.entropy.masked_fill(~is_response, 0.0).sum(dim=1)
    lengths = is_response.sum(dim=1).float()
    ratio = update.mean("ratio")
    penalty = -kl_coef * kl.mean()
    # 1 - var(R - V) / var(R): how much of the returns the critic foresees.
    unexplained = masked_variance(returns - before.values, is_response)
    explained = 1.0 - unexplained / masked_variance(returns, is_response).clamp(min=1e-8)
    return {
        "objective/scores": float(answers.scores.mean()),
        "objective/scores_std": float(answers.scores.std(correction=0)),
        "objective/kl": float(kl.mean()),
        "objective/kl_per_token": float(masked_mean(log_ratio, is_response)),
        "objective/entropy": float(entropy.mean()),
        "objective/non_score_reward": float(penalty),
        "objective/rlhf_reward": float(scores.mean() + penalty),
        "objective/kl_coef": kl_coef,
        "policy/approxkl_avg": update.mean("approx_kl"),
        "policy/clipfrac_avg": update.mean("clipped"),
        "policy/entropy_avg": update.mean("entropy"),
        "policy/grad_norm": sum(update.grad_norms) / max(len(update.grad_norms), 1),
        "loss/policy_avg": update.mean("policy_loss"),
        "loss/value_avg": update.mean("value_loss"),
        "val/clipfrac_avg": update.mean("value_clipped"),
        "val/ratio": ratio,
        "val/ratio_var": max(update.mean("squared_ratio") - ratio**2, 0.0),
        "val/first_epoch_ratio": update.epochs[0][2],
        "val/first_epoch_approxkl": update.epochs[0][0],
        "val/largest_log_ratio": update.largest_log_ratio[1],
        "val/explained_variance": float(explained),
        "val/num_eos_tokens": float(sum(answers.ended)),
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
        "skipped_steps": float(update.skipped_steps),
    }


def note(metrics: dict[str, float]) -> str:
    """The metrics that matter while it runs, in the width that is left beside a bar."""
    return (
        f"reward {metrics['objective/scores']:.2f}  kl {metrics['objective/kl']:.1f}  "
        f"len {metrics['length/mean']:.0f}  clip {metrics['policy/clipfrac_avg']:.2f}"
    )
