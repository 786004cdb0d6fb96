"""The KL penalty: per-token estimates of KL(pi || pi_SFT), and the coefficient that adapts to a target."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_per_token(logprobs: Tensor, reference_logprobs: Tensor, estimator: KLEstimator = "k1") -> Tensor:
    """Estimate of KL(pi || ref) at each sampled token, in nats (Schulman 2020, "Approximating KL Divergence").

    With x = log pi - log ref at the token: k1 = x, unbiased and of either sign; k2 = x^2 / 2, biased, never negative;
    k3 = exp(-x) - 1 + x, unbiased and never negative.

    As a penalty, what counts is the gradient over samples of pi. In the loss, that of k2, x grad log pi, is the
    gradient of the KL of a token, the tokens before it given; that of k3, (1 - exp(-x)) grad log pi, agrees with it to
    first order in x; that of k1, grad log pi, has mean zero. In the reward, an estimate k weighs the score function,
    k grad log pi: with k1 this is the gradient of the KL. With k2 and k3 it is not: both are positive for a token that
    pi made rarer, too, and make it rarer still.

    Args:
        logprobs: (B, T) nats, under the policy that sampled; may carry gradient.
        reference_logprobs: (B, T) nats, under the SFT model.
        estimator: which.

    Returns:
        (B, T) nats.
    """
    log_ratio = logprobs - reference_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    return (-log_ratio).expm1() + log_ratio


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, episodes: int) -> float:
    """Next coefficient of the adaptive controller (Ziegler et al. 2019, section 2.2).

    beta' = beta (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon).

    Args:
        kl_coef: beta, reward per nat.
        kl: measured mean KL of the step's completions, in nats per completion.
        target: KL to steer to, in nats per completion.
        horizon: completions over which beta moves.
        episodes: n, completions of this step.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * episodes / horizon)
