"""Curves of a gold reward against the distance to the initial policy, d = sqrt(KL), as Gao et al. 2022 fit them.

    best of n   R(d) = d (alpha - beta d)      highest at alpha / (2 beta)
    RL          R(d) = d (alpha - beta ln d)   highest at exp(alpha / beta - 1)

R is relative to the initial policy, R(0) = 0 (arXiv:2210.10760, equations 1 and 2). Both are linear in alpha and beta,
so a fit is a least-squares solution in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.intervals import percentiles

Method = Literal["best-of-n", "rl"]
Array = NDArray[np.float64]

_FEWEST_POINTS = 3
_RESAMPLES = 1000
_SMALL = 1e-9
_LARGEST_EXPONENT = 300.0
FEWEST_NATS = 1.0
"""Least KL of a point that the fit for RL uses: its slope is infinite at 0, and Gao et al. do not fit there either."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: the estimate.
        low: lower end.
        high: upper end; infinite where more than 2.5 % of the resamples have no upper end.
    """

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """Return plain values; null is not known or infinite."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Fit:
    """A curve fitted to the gold reward.

    Attributes:
        method: which curve.
        alpha: slope, in reward per sqrt(nat).
        beta: how fast the slope falls.
        peak: d with the highest gold reward; infinite if the curve only rises, 0 if it only falls.
        points: number of points.
        farthest: largest d of a point.
        turned: share of the resamples whose peak is below `farthest`.
        residual: root mean square of the points' distance to the curve, in reward.
    """

    method: Method
    alpha: Estimate
    beta: Estimate
    peak: Estimate
    points: int
    farthest: float
    turned: float
    residual: float

    @property
    def turns_over(self) -> bool:
        """Whether the gold reward of the curve falls before the last point."""
        return self.peak.value < self.farthest

    @property
    def falls_from_start(self) -> bool:
        """Whether the gold reward falls from the first point that the fit uses: where before it, is not known."""
        return self.peak.value < (FEWEST_NATS**0.5 if self.method == "rl" else _SMALL)

    def at(self, distances: Array) -> Array:
        """Return R(d) of the curve."""
        first, second = _terms(self.method, distances)
        return self.alpha.value * first - self.beta.value * second

    def said(self) -> str:
        """Return in words where the gold reward is highest."""
        peak, share = self.peak, f"in {self.turned:.0%} of resamples"
        if self.falls_from_start:
            return f"gold falls from the start ({share})"
        if not self.turns_over:
            return f"no peak up to {self.farthest**2:.1f} nats (but one {share})"
        to = "beyond the data" if peak.high >= self.farthest else f"{peak.high**2:.1f}"
        return f"gold is highest at {peak.value**2:.1f} nats ({peak.low**2:.1f} to {to}), and falls after it {share}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "method": self.method,
            "alpha": self.alpha.to_json(),
            "beta": self.beta.to_json(),
            "peak_sqrt_kl": self.peak.to_json(),
            "peak_kl": Estimate(*(end**2 for end in (self.peak.value, self.peak.low, self.peak.high))).to_json(),
            "turns_over": self.turns_over,
            "turned_share": self.turned,
            "points": self.points,
            "farthest_sqrt_kl": self.farthest,
            "residual": self.residual,
            "said": self.said(),
        }


def fit(method: Method, kl: Array, gold: Array, *, seed: int = 0) -> Fit | None:
    """Fit the gold reward of C points, with intervals over seeds and prompts.

    Each resample draws seeds and prompts with replacement; all seeds have the same prompts. With one seed, it draws
    prompts alone, and the intervals say nothing about other seeds. The bootstrap of two or three seeds is too narrow.

    Args:
        method: which curve.
        kl: (S, P, C) nats; one value per completion, or a bound that holds for all.
        gold: (S, P, C) gold reward minus that of the initial policy on the same prompt.
        seed: of the resamples.

    Returns:
        None if fewer than three points can be used; see `FEWEST_NATS`.
    """
    distance, reward = np.sqrt(np.maximum(kl.mean(axis=(0, 1)), 0.0)), gold.mean(axis=(0, 1))
    used = _used(method, distance)
    alpha, beta = (float(one[0]) for one in least_squares(method, distance[None], reward[None]))
    if math.isnan(alpha):
        return None
    many_kl, many_rewards = _resampled((kl, gold), seed)
    alphas, betas = least_squares(method, np.sqrt(np.maximum(many_kl, 0.0)), many_rewards)
    known = ~np.isnan(alphas)
    if not known.any():
        return None
    alphas, betas, farthest = alphas[known], betas[known], float(distance.max())
    peaks = _peaks(method, alphas, betas, farthest)
    first, second = _terms(method, distance[used])
    distances_to_curve = reward[used] - (alpha * first - beta * second)
    return Fit(
        method=method,
        alpha=Estimate(alpha, *percentiles(alphas)),
        beta=Estimate(beta, *percentiles(betas)),
        peak=Estimate(float(_peaks(method, np.array([alpha]), np.array([beta]), farthest)[0]), *_ends(peaks)),
        points=int(used.sum()),
        farthest=farthest,
        turned=float((peaks < farthest).mean()),
        residual=float(np.sqrt((distances_to_curve**2).mean())),
    )


def least_squares(method: Method, distances: Array, rewards: Array) -> tuple[Array, Array]:
    """Return alpha and beta of B fits: (B,) each, NaN where fewer than three points can be used.

    Args:
        method: which curve.
        distances: (B, C) sqrt(nats).
        rewards: (B, C) relative to the initial policy.
    """
    used = _used(method, distances)
    first, second = (np.where(used, term, 0.0) for term in _terms(method, distances))
    second, reward = -second, np.where(used, rewards, 0.0)
    one, both, two = ((a * b).sum(axis=1) for a, b in ((first, first), (first, second), (second, second)))
    first_sum, second_sum = (first * reward).sum(axis=1), (second * reward).sum(axis=1)
    determinant = one * two - both**2
    enough = (used.sum(axis=1) >= _FEWEST_POINTS) & (determinant > _SMALL * np.maximum(one * two, _SMALL))
    determinant = np.where(enough, determinant, np.nan)
    return (two * first_sum - both * second_sum) / determinant, (one * second_sum - both * first_sum) / determinant


def _terms(method: Method, distances: Array) -> tuple[Array, Array]:
    """Return what alpha and -beta are multiplied by."""
    if method == "best-of-n":
        return distances, distances**2
    return distances, distances * np.log(np.maximum(distances, _SMALL))


def _used(method: Method, distances: Array) -> NDArray[np.bool_]:
    least = FEWEST_NATS**0.5 if method == "rl" else _SMALL
    return distances >= least


def _peaks(method: Method, alpha: Array, beta: Array, farthest: float) -> Array:
    """Return d of the highest reward of curves.

    A curve with beta <= 0 has no maximum inside: it is highest at its end (infinite), or at its start (0) if the reward
    at `farthest` is below that.
    """
    turns = beta > _SMALL * np.maximum(1.0, np.abs(alpha))
    safe = np.where(turns, beta, 1.0)
    if method == "best-of-n":
        peak = np.maximum(alpha / (2 * safe), 0.0)
    else:
        peak = np.exp(np.minimum(alpha / safe - 1.0, _LARGEST_EXPONENT))
    first, second = _terms(method, np.array(farthest))
    return np.where(turns, peak, np.where(alpha * first - beta * second > 0, np.inf, 0.0))


def _ends(peaks: Array) -> tuple[float, float]:
    """Return the ends of the central 95 %, without interpolation: a peak may be infinite."""
    low, high = np.quantile(peaks, [0.025, 0.975], method="closest_observation").tolist()
    return low, high


def mean_over_seeds_and_prompts(values: Array, *, seed: int = 0) -> list[Estimate]:
    """Return the means of C points, with intervals over seeds and prompts as those of `fit`.

    Args:
        values: (S, P, C).
        seed: of the resamples.
    """
    (many,) = _resampled((values,), seed)
    lows, highs = np.quantile(many, [0.025, 0.975], axis=0)
    ends = zip(values.mean(axis=(0, 1)).tolist(), lows.tolist(), highs.tolist(), strict=True)
    return [Estimate(*one) for one in ends]


def _resampled(values: Sequence[Array], seed: int) -> list[Array]:
    """Return means over seeds and prompts drawn with replacement: (resamples, C) for each (S, P, C)."""
    seeds, prompts, _ = values[0].shape
    generator = np.random.default_rng(seed)
    of_seeds = generator.multinomial(seeds, [1 / seeds] * seeds, size=_RESAMPLES) / seeds
    of_prompts = generator.multinomial(prompts, [1 / prompts] * prompts, size=_RESAMPLES) / prompts
    return [np.einsum("bs,bp,spc->bc", of_seeds, of_prompts, one, optimize=True) for one in values]
