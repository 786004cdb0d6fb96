"""Length-controlled win rate: what it would be if both models wrote completions of equal length."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.intervals import Measure, student_quantile

FEWEST_PROMPTS = 10
"""With fewer prompts, two coefficients are not estimated."""
_LEAST_SPREAD = 0.05
"""Standard deviation of the length term, between -1 and 1, below which its coefficient is not estimated."""
_STEPS = 60
_LARGEST = 15.0
"""Log-odds beyond which the likelihood has no maximum for practical purposes: the winner is determined."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LengthControlled:
    """A length-controlled win rate.

    Attributes:
        win_rate: at equal lengths, with its interval over prompts; `missing` says why there is none.
        length_effect: what being longer by one standard deviation adds to the log-odds of winning: the coefficient of
            the length term times tanh(1); None without a win rate.
        extrapolated: whether one model was the longer one on every prompt, so that equal lengths were never seen.
    """

    win_rate: Measure
    length_effect: float | None = None
    extrapolated: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the win rate and its interval, the effect of length, and whether it is extrapolated."""
        more = {"length_effect": self.length_effect, "extrapolated": self.extrapolated}
        return self.win_rate.to_json() | more


def length_controlled_win_rate(
    prompts: Sequence[Hashable], wins: Sequence[float], longer_by: Sequence[float]
) -> LengthControlled:
    """Win rate of a policy against a baseline at equal lengths (Dubois et al. 2024, arXiv:2404.04475, eq. 1 and 3).

    Logistic regression of the preferences: log-odds = theta + phi tanh(d / std(d)), where d is how much longer the
    policy's completion is; the result is 1 / (1 + exp(-theta)), the prediction at d = 0. Ties enter as 1/2.

    Simplified against the paper: no term for the difficulty of an instruction, which is fitted there to many models and
    cannot be told from one comparison, and no regularization. The interval is Student's on the log-odds, with n - 2
    degrees of freedom and the standard error of a jackknife over prompts (one Newton step per prompt, CR3; Cameron and
    Miller 2015).

    Args:
        prompts: (N,) key of the prompt of each comparison.
        wins: (N,) 1 where the policy won, 1/2 where it tied, 0 where it lost.
        longer_by: (N,) length of the policy's completion minus that of the baseline's, in any unit.
    """
    keys = {key: number for number, key in enumerate(dict.fromkeys(prompts))}
    count, won = len(keys), np.asarray(wins, dtype=np.float64)
    difference = np.asarray(longer_by, dtype=np.float64)
    if reason := _refusal(count, won, difference):
        return LengthControlled(Measure(None, None, None, count, reason))
    features = np.column_stack([np.ones(len(won)), np.tanh(difference / difference.std())])
    if features[:, 1].std() < _LEAST_SPREAD:
        reason = "one model always writes far longer completions, so nothing is known about equal lengths"
        return LengthControlled(Measure(None, None, None, count, reason), extrapolated=True)
    coefficients = _fit(features, won)
    if coefficients is None:
        reason = "the lengths determine which completion wins, so model and length cannot be told apart"
        return LengthControlled(Measure(None, None, None, count, reason))
    theta, phi = coefficients.tolist()
    groups = np.array([keys[prompt] for prompt in prompts])
    error = _jackknife_error(features, won, coefficients, groups, count)
    effect, is_extrapolated = phi * math.tanh(1.0), bool((difference > 0).all() or (difference < 0).all())
    if not 0.0 < error < _LARGEST:
        measure = Measure(_logistic(theta), None, None, count, "single prompts decide the result: there is no interval")
    else:
        reach = student_quantile(0.975, count - 2) * error
        measure = Measure(_logistic(theta), _logistic(theta - reach), _logistic(theta + reach), count)
    return LengthControlled(measure, effect, is_extrapolated)


def _refusal(count: int, won: Array, difference: Array) -> str | None:
    if count < FEWEST_PROMPTS:
        return f"fewer than {FEWEST_PROMPTS} prompts"
    if won.min() == won.max():
        return f"the policy {'won' if won[0] == 1 else 'lost' if won[0] == 0 else 'tied'} every time"
    if difference.std() == 0.0:
        return "the difference of the lengths is the same for all prompts"
    return None


def _fit(features: Array, won: Array) -> Array | None:
    """Maximum of the likelihood by Newton's method with halved steps; None if there is none.

    Args:
        features: (N, 2).
        won: (N,) between 0 and 1.
    """
    coefficients = np.zeros(features.shape[1])
    before = _loss(features, won, coefficients)
    for _ in range(_STEPS):
        chance = _chances(features, coefficients)
        gradient = features.T @ (won - chance)
        if np.abs(gradient).max() < 1e-9 * len(won):
            return coefficients
        curvature = features.T @ (features * (chance * (1 - chance))[:, None])
        if np.linalg.cond(curvature) > 1e12:
            return None
        step = np.linalg.solve(curvature, gradient)
        while (after := _loss(features, won, coefficients + step)) > before and np.abs(step).max() > 1e-12:
            step = step / 2
        coefficients, before = coefficients + step, after
        if np.abs(coefficients).max() > _LARGEST:
            return None
    return coefficients


def _chances(features: Array, coefficients: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-(features @ coefficients)))


def _loss(features: Array, won: Array, coefficients: Array) -> float:
    log_odds = features @ coefficients
    return float((np.logaddexp(0.0, log_odds) - won * log_odds).sum())


def _jackknife_error(features: Array, won: Array, coefficients: Array, groups: NDArray[np.intp], count: int) -> float:
    """Standard error of the first coefficient over prompts; infinite if a prompt cannot be omitted.

    Args:
        features: (N, 2).
        won: (N,).
        coefficients: (2,) at the maximum.
        groups: (N,) number of each row's prompt.
        count: number of prompts.
    """
    chance = _chances(features, coefficients)
    weighted = features * (chance * (1 - chance))[:, None]
    curvatures = np.zeros((count, 2, 2))
    np.add.at(curvatures, groups, features[:, :, None] * weighted[:, None, :])
    scores = np.zeros((count, 2))
    np.add.at(scores, groups, features * (won - chance)[:, None])
    left = curvatures.sum(axis=0) - curvatures
    if np.linalg.cond(left).max() > 1e12:
        return math.inf
    moves = np.linalg.solve(left, scores[:, :, None])[:, 0, 0]
    return math.sqrt((count - 1) / count * float((moves**2).sum()))


def _logistic(log_odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-log_odds))
