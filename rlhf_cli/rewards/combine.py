"""Several rewards become one.

An ensemble of reward models is harder to fool than one of them, since answers that exploit one tend to be where the
others disagree with it (Coste et al. 2023, arXiv:2310.02743): the least of them, or the mean less their spread, trusts
only what all of them like.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from rlhf_cli.data.records import Prompt
from rlhf_cli.progress import warn
from rlhf_cli.rewards.checks import first_not_finite, sample
from rlhf_cli.rewards.contract import Reward, Scores

Combination = Literal["sum", "mean", "min", "mean-std"]


def combined(weighted: Sequence[float], combination: Combination, *, std_coef: float = 1.0) -> float:
    """One number of K, with x_k = weight_k r_k (Coste et al. 2023, section 3 has min and the mean less a variance).

    sum: sum x_k. mean: sum x_k / K. min: min x_k. mean-std: mean - std_coef std, where std is that of the population,
    sqrt(sum (x_k - mean)^2 / K): the members are all there are, not a sample of more.

    Args:
        weighted: (K,) at least one. NaN or infinity among them makes NaN, whatever the others are.
        combination: which.
        std_coef: lambda of mean-std.
    """
    if not all(map(math.isfinite, weighted)):
        return math.nan
    mean = sum(weighted) / len(weighted)
    if combination == "sum":
        return sum(weighted)
    if combination == "mean":
        return mean
    if combination == "min":
        return min(weighted)
    variance = sum((value - mean) ** 2 for value in weighted) / len(weighted)
    return mean - std_coef * math.sqrt(variance)


class CombinedReward:
    """Several rewards as PPO sees them.

    Args:
        members: (reward, weight), at least one.
        combination: how the weighted rewards become one, see `combined`.
        std_coef: lambda of mean-std.
    """

    def __init__(
        self, members: Sequence[tuple[Reward, float]], combination: Combination = "sum", *, std_coef: float = 1.0
    ) -> None:
        if not members:
            raise ValueError("no reward to combine")
        if combination not in get_args(Combination):
            raise ValueError(f"unknown combination `{combination}`")
        self._members = list(members)
        self._combination: Combination = combination
        self._std_coef = std_coef
        self.names = _unique([reward.name for reward, _ in members])

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Scores:
        """Score N answers; N may be 0.

        An answer for which a reward is NaN or infinite has the total NaN: PPO leaves that step out and goes on. One
        warning says which reward gave how many such numbers, and for which sample first; in a run of several processes
        only the first can print it, so `Scores.faults` says the same.

        Raises:
            DataError: a reward gave no usable answer, see `Reward.score`.
        """
        parts = {
            name: reward.score(prompts, completions) if completions else []
            for name, (reward, _) in zip(self.names, self._members, strict=True)
        }
        faults = _faults(parts, prompts, completions)
        if faults:
            warn("; ".join(faults))
        weights = [weight for _, weight in self._members]
        total = [
            combined(
                [weight * score for weight, score in zip(weights, scores, strict=True)],
                self._combination,
                std_coef=self._std_coef,
            )
            for scores in zip(*parts.values(), strict=True)
        ]
        return Scores(total, parts, faults)


def _faults(parts: dict[str, list[float]], prompts: Sequence[Prompt], completions: Sequence[str]) -> list[str]:
    found = []
    for name, scores in parts.items():
        if (bad := first_not_finite(scores)) is not None:
            count = sum(not math.isfinite(score) for score in scores)
            found.append(
                f"the reward `{name}` is not finite for {count:,} of {len(scores):,} answers: {scores[bad]} for "
                f"{sample(prompts[bad], completions[bad])}"
            )
    return found


def _unique(names: Sequence[str]) -> list[str]:
    """The same names, with -2, -3 ... behind those that came before."""
    found: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in found:
            number += 1
            candidate = f"{name}-{number}"
        found.append(candidate)
    return found
