"""KL divergence of a policy from a baseline, estimated from completions of the policy, with its error."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlhf_cli.intervals import Measure, finite, mean_interval, standard_error
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


_SURE = 0.999
"""Coverage of the interval by which `disagreement` decides: it warns of one sound evaluation in a thousand."""


def disagreement(prompts: Sequence[Hashable], log_ratios: Sequence[Sequence[float]]) -> str | None:
    """Say why the two estimators differ, or return None where chance explains the difference.

    k1 - k3 of a token is 1 - exp(-x), whose mean under the policy is 0. Its mean over completions is above 0 if tokens
    that the policy made rare never came up: exp(-x) of those is large. It is below 0 if the completions were drawn from
    another distribution than the one with these probabilities.

    Args:
        prompts: (N,) key of the prompt of each completion.
        log_ratios: N lists, log policy - log baseline of each token in nats.
    """
    with np.errstate(over="ignore"):
        differences = [-float(np.expm1(-np.asarray(own, dtype=np.float64)).sum()) for own in log_ratios]
    values = by_prompt(prompts, differences)
    if not np.isfinite(values).all():
        return "k3 is infinite: the baseline gives a token a far higher probability than the policy does"
    low, high = mean_interval(values, _SURE)
    if len(values) < 2 or low <= 0.0 <= high:
        return None
    if low > 0.0:
        return "k3 misses tokens that the policy made rare: read k1"
    return "the completions were not drawn with the policy's probabilities: neither estimate is the KL"
