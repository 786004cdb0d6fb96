"""Combine several rewards into one.

An ensemble of reward models is harder to exploit than one of them: on completions that exploit one model, the others
tend to disagree (Coste et al. 2023, arXiv:2310.02743). The minimum, or the mean minus the spread, is high only where
all members agree.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Literal, get_args

from rlhf_cli.data.records import Prompt
from rlhf_cli.progress import warn
from rlhf_cli.rewards.base import NO_COLUMNS, Columns, Reward, Scores
from rlhf_cli.rewards.validation import sample

Combination = Literal["sum", "mean", "min", "mean-std"]


def combined(weighted: Sequence[float], combination: Combination, *, std_coef: float = 1.0) -> float:
    """Combine K weighted rewards x_k = weight_k r_k (cf. Coste et al. 2023, section 3: min, and mean minus variance).

    sum: sum x_k. mean: sum x_k / K. min: min x_k. mean-std: mean - std_coef std, with the population's standard
    deviation sqrt(sum (x_k - mean)^2 / K), because the members are the whole population.

    Args:
        weighted: (K,) with K >= 1.
        combination: name of the combination.
        std_coef: lambda of mean-std.

    Returns:
        The combined reward; NaN if a member or the result is not finite in float32, the precision of training.
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


def _is_sharded(reward: Reward) -> bool:
    """Whether all processes score together, also those without completions."""
    return getattr(reward, "is_sharded", False)


def _is_finite(number: float) -> bool:
    """Return whether a number is finite in float32, in which training would read 1e39 as infinity."""
    try:
        return math.isfinite(struct.unpack("<f", struct.pack("<f", number))[0])
    except OverflowError:
        return False


class CombinedReward:
    """Several weighted rewards, combined into one.

    Args:
        members: (reward, weight) pairs, at least one with a weight other than 0. Those with weight 0 are scored and
            reported, and not combined.
        combination: see `combined`.
        std_coef: lambda of mean-std.

    Attributes:
        names: of the members, each once.
        weights: name -> weight.
    """

    def __init__(
        self, members: Sequence[tuple[Reward, float]], combination: Combination = "sum", *, std_coef: float = 1.0
    ) -> None:
        if not any(weight for _, weight in members):
            raise ValueError("there must be at least one reward to combine, with a weight other than 0")
        if combination not in get_args(Combination):
            raise ValueError(f"unknown combination `{combination}`")
        self._members = list(members)
        self._combination: Combination = combination
        self._std_coef = std_coef
        self.names = _unique([reward.name for reward, _ in members])
        self.weights = dict(zip(self.names, (weight for _, weight in members), strict=True))

    def described(self) -> str:
        """Describe the combination for people, such as `the min of reward-model and 2 x gold.py:score`."""
        named = self.weights.items()
        parts = [name if weight == 1 else f"{weight:g} x {name}" for name, weight in named if weight]
        logged = "".join(f"; {name} is logged only" for name, weight in named if not weight)
        if len(parts) == 1:
            return f"{parts[0]}{logged}"
        how = {"mean-std": f"mean - {self._std_coef:g} std"}.get(self._combination, self._combination)
        return f"the {how} of {', '.join(parts[:-1])} and {parts[-1]}{logged}"

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Columns = NO_COLUMNS) -> Scores:
        """Score N completions; N may be 0. With a sharded reward model every process calls this.

        If a reward, before or after weighting, is not finite in float32, the completion's total is NaN, and PPO skips
        the step. One warning says which rewards were not finite, how often and for which sample first. `Scores.faults`
        holds the same text, because only the main process prints warnings.

        Raises:
            DataError: the scores of a reward are unusable, see `Reward.score`.
        """
        parts = {
            name: reward.score(prompts, completions, columns) if completions or _is_sharded(reward) else []
            for name, (reward, _) in zip(self.names, self._members, strict=True)
        }
        weighted = {
            name: [weight * score if _is_finite(score) else math.nan for score in parts[name]]
            for name, weight in self.weights.items()
            if weight
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
    """Describe scores that are not finite, one message per reward, then results that only the combination broke."""
    found = []
    explained: set[int] = set()
    for name, scores in weighted.items():
        bad = [position for position, score in enumerate(scores) if not _is_finite(score)]
        if bad:
            first = parts[name][bad[0]]
            size = " (too large for float32, before or after weighting)" if math.isfinite(first) else ""
            found.append(_fault(f"the reward `{name}`", bad, f"{first}{size}", prompts, completions))
        explained.update(bad)
    rest = [position for position, score in enumerate(total) if math.isnan(score) and position not in explained]
    if rest:
        found.append(_fault("the combined reward", rest, "too large for float32", prompts, completions))
    return found


def _fault(subject: str, bad: list[int], what: str, prompts: Sequence[Prompt], completions: Sequence[str]) -> str:
    shown = sample(prompts[bad[0]], completions[bad[0]])
    return f"{subject} is not finite for {len(bad):,} of {len(completions):,} completions: {what} for {shown}"


def _unique(names: Sequence[str]) -> list[str]:
    """Make names unique by appending -2, -3, ... to repeated ones."""
    found: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in found:
            number += 1
            candidate = f"{name}-{number}"
        found.append(candidate)
    return found
