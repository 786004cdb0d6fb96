"""Several rewards become one.

An ensemble of reward models is harder to fool than one of them, since answers that exploit one tend to be where the
others disagree with it (Coste et al. 2023, arXiv:2310.02743): the least of them, or the mean less their spread, trusts
only what all of them like.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Literal, get_args

from rlhf_cli.data.records import Prompt
from rlhf_cli.progress import warn
from rlhf_cli.rewards.base import Reward, Scores
from rlhf_cli.rewards.validation import sample

Combination = Literal["sum", "mean", "min", "mean-std"]


def combined(weighted: Sequence[float], combination: Combination, *, std_coef: float = 1.0) -> float:
    """One number of K, with x_k = weight_k r_k (Coste et al. 2023, section 3 has min and the mean less a variance).

    sum: sum x_k. mean: sum x_k / K. min: min x_k. mean-std: mean - std_coef std, where std is that of the population,
    sqrt(sum (x_k - mean)^2 / K): the members are all there are, not a sample of more.

    Args:
        weighted: (K,) at least one. NaN or infinity among them makes NaN, whatever the others are; so does a result
            beyond float32, in which rewards are trained on.
        combination: which.
        std_coef: lambda of mean-std.
    """
    if not all(map(_is_finite, weighted)):
        return math.nan
    mean = sum(weighted) / len(weighted)
    if combination == "sum":
        result = sum(weighted)
    elif combination == "mean":
        result = mean
    elif combination == "min":
        result = min(weighted)
    else:
        variance = sum((value - mean) ** 2 for value in weighted) / len(weighted)
        result = mean - std_coef * math.sqrt(variance)
    return result if _is_finite(result) else math.nan


def _is_finite(number: float) -> bool:
    """In float32: 1e39 is a number here and infinity where it is trained on."""
    try:
        return math.isfinite(struct.unpack("<f", struct.pack("<f", number))[0])
    except OverflowError:
        return False


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

    def described(self) -> str:
        """The combination for people: `min of reward-model and 2 x gold.py:score`."""
        weights = [weight for _, weight in self._members]
        named = zip(self.names, weights, strict=True)
        parts = [name if weight == 1 else f"{weight:g} x {name}" for name, weight in named]
        if len(parts) == 1:
            return parts[0]
        how = {"mean-std": f"mean - {self._std_coef:g} std"}.get(self._combination, self._combination)
        return f"the {how} of {', '.join(parts[:-1])} and {parts[-1]}"

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Scores:
        """Score N answers; N may be 0.

        An answer for which a reward is NaN or infinite in float32, as given or with its weight, has the total NaN: PPO
        leaves that step out and goes on. One warning says which reward gave how many such numbers, and for which
        sample first; in a run of several processes only the first can print it, so `Scores.faults` says the same.

        Raises:
            DataError: a reward gave no usable answer, see `Reward.score`.
        """
        parts = {
            name: reward.score(prompts, completions) if completions else []
            for name, (reward, _) in zip(self.names, self._members, strict=True)
        }
        weights = [weight for _, weight in self._members]
        weighted = {
            name: [weight * score if _is_finite(score) else math.nan for score in scores]
            for (name, scores), weight in zip(parts.items(), weights, strict=True)
        }
        total = [
            combined(scores, self._combination, std_coef=self._std_coef)
            for scores in zip(*weighted.values(), strict=True)
        ]
        faults = _faults(parts, weighted, total, prompts, completions)
        if faults:
            warn("; ".join(faults))
        return Scores(total, parts, faults)


def _faults(
    parts: dict[str, list[float]],
    weighted: dict[str, list[float]],
    total: list[float],
    prompts: Sequence[Prompt],
    completions: Sequence[str],
) -> list[str]:
    """What is not finite, reward by reward; the combination only where it alone is to blame."""
    found = []
    blamed: set[int] = set()
    for name, scores in parts.items():
        bad = [place for place, score in enumerate(weighted[name]) if not _is_finite(score)]
        if bad:
            first = scores[bad[0]]
            size = " (too large for float32, as it is or with its weight)" if math.isfinite(first) else ""
            found.append(_fault(f"the reward `{name}`", bad, f"{first}{size}", prompts, completions))
        blamed.update(bad)
    rest = [place for place, score in enumerate(total) if math.isnan(score) and place not in blamed]
    if rest:
        found.append(_fault("the combined reward", rest, "too large for float32", prompts, completions))
    return found


def _fault(who: str, bad: list[int], what: str, prompts: Sequence[Prompt], completions: Sequence[str]) -> str:
    shown = sample(prompts[bad[0]], completions[bad[0]])
    return f"{who} is not finite for {len(bad):,} of {len(completions):,} answers: {what} for {shown}"


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
