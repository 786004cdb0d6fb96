"""KL divergence of a policy from a baseline, estimated from completions of the policy, with its error."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlhf_cli.intervals import Measure, finite, standard_error
from rlhf_cli.statistics.paired import by_prompt, mean_of

Estimator = Literal["k1", "k3"]


@dataclass(frozen=True)
class KLEstimate:
    """KL(policy || baseline) per completion in nats.

    Attributes:
        estimator: "k1" or "k3", see `completion_kl`.
        mean: over prompts, with Student's interval.
        standard_error: of the mean over prompts.
    """

    estimator: Estimator
    mean: Measure
    standard_error: float

    def to_json(self) -> dict[str, Any]:
        """Return the mean and its interval, the estimator and the error."""
        return {**self.mean.to_json(), "estimator": self.estimator, "standard_error": finite(self.standard_error)}


def completion_kl(log_ratios: Sequence[float], estimator: Estimator) -> float:
    """Estimate of the KL from one completion: the sum over its tokens, in nats (Schulman 2020).

    With x = log policy - log baseline at a token that the policy drew: k1 = x; k3 = exp(-x) - 1 + x, which is never
    negative. The mean over completions of either is unbiased for the KL of completions: at each token, the tokens
    before it given, both have the KL of the next token as their mean. k3 has the lower variance while the two are
    close, and a heavy tail where the policy makes tokens of the baseline rare.

    Args:
        log_ratios: (T,) x of each token.
        estimator: which.
    """
    x = np.asarray(log_ratios, dtype=np.float64)
    with np.errstate(over="ignore"):
        return float(x.sum() if estimator == "k1" else (np.expm1(-x) + x).sum())


def kl_estimate(
    prompts: Sequence[Hashable], log_ratios: Sequence[Sequence[float]], estimator: Estimator = "k1"
) -> KLEstimate:
    """Estimate of the KL from completions of the policy; the prompts are the units of its error.

    Args:
        prompts: (N,) key of the prompt of each completion.
        log_ratios: N lists, log policy - log baseline of each token in nats.
        estimator: see `completion_kl`.
    """
    values = by_prompt(prompts, [completion_kl(own, estimator) for own in log_ratios])
    error = standard_error(values) if np.isfinite(values).all() else float("inf")
    return KLEstimate(estimator, mean_of(values), error)
