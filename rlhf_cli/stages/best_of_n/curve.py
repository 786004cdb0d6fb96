"""The curve of best of n: what the best of n completions is worth, for n = 1, 2, 4, ..., N."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from rlhf_cli.intervals import mean_interval
from rlhf_cli.statistics.best_of_n import expected_best, kl_bound, sizes_up_to
from rlhf_cli.statistics.overoptimization import Array, Estimate, Fit, fit


@dataclass(frozen=True)
class Point:
    """The best of n.

    Attributes:
        n: number of completions to choose from.
        kl_bound: upper bound of the KL to the policy, in nats per completion.
        reward: mean over prompts of what chose.
        gold: mean over prompts of what measured; None without.
        gold_gain: mean over prompts of gold minus that of one completion of the same prompt; None without.
    """

    n: int
    kl_bound: float
    reward: Estimate
    gold: Estimate | None
    gold_gain: Estimate | None


@dataclass(frozen=True)
class Curve:
    """The best of n for growing n.

    Attributes:
        prompts: number of prompts.
        completions: number of completions per prompt, N.
        points: one per n.
        fit: of gold against the square root of the KL bound; None without gold or with too few points.
    """

    prompts: int
    completions: int
    points: Sequence[Point]
    fit: Fit | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values; intervals are 95 % over prompts."""
        points = []
        for point in self.points:
            plain: dict[str, Any] = {"n": point.n, "kl_upper_bound": point.kl_bound, "reward": point.reward.to_json()}
            if point.gold is not None and point.gold_gain is not None:
                plain |= {"gold": point.gold.to_json(), "gold_gain": point.gold_gain.to_json()}
            points.append(plain)
        fitted = None if self.fit is None else self.fit.to_json()
        return {
            "prompts": self.prompts,
            "samples_per_prompt": self.completions,
            "points": points,
            "gold_fit": fitted,
        }

    def metrics(self) -> dict[str, float]:
        """Return name -> value, for the manifest."""
        found: dict[str, float] = {"prompts": self.prompts}
        for point in self.points:
            found |= {f"reward/best_of_{point.n}": point.reward.value, f"kl_bound/best_of_{point.n}": point.kl_bound}
            if point.gold is not None:
                found[f"gold/best_of_{point.n}"] = point.gold.value
        return found


def measure(rewards: Sequence[Sequence[float]], gold: Sequence[Sequence[float]] | None) -> Curve:
    """Return the curve of P prompts.

    Args:
        rewards: P lists of N scores, which choose; N may differ between prompts.
        gold: of the same completions, to measure what was chosen.
    """
    fewest = min(map(len, rewards))
    sizes = sizes_up_to(fewest)
    chosen = np.stack([expected_best(row, row, sizes) for row in rewards])
    measured = None
    if gold is not None:
        measured = np.stack([expected_best(row, of, sizes) for row, of in zip(rewards, gold, strict=True)])
    points = [
        Point(
            n,
            kl_bound(n),
            _estimate(chosen[:, column]),
            None if measured is None else _estimate(measured[:, column]),
            None if measured is None else _estimate(measured[:, column] - measured[:, 0]),
        )
        for column, n in enumerate(sizes)
    ]
    return Curve(len(rewards), fewest, points, None if measured is None else fit_gold(sizes, measured[None]))


def fit_gold(sizes: Sequence[int], gold: Array) -> Fit | None:
    """Fit gold scores of best of n against the square root of the KL bound.

    Args:
        sizes: n, the first of which is 1.
        gold: (S, P, len(sizes)) for S seeds and P prompts.
    """
    kl = np.broadcast_to(np.array([kl_bound(n) for n in sizes]), gold.shape)
    return fit("best-of-n", kl, gold - gold[:, :, :1])


def _estimate(values: Array) -> Estimate:
    return Estimate(float(values.mean()), *mean_interval(values))


def curve_table(curve: Curve) -> Table:
    """Return the curve as a table that fits 80 columns."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("n", justify="right")
    table.add_column("KL at most", justify="right", no_wrap=True)
    table.add_column("reward (95 %)", justify="right", no_wrap=True)
    has_gold = curve.points[0].gold is not None
    if has_gold:
        table.add_column("gold (95 %)", justify="right", no_wrap=True)
    for point in curve.points:
        cells = [_shown(point.reward)] + ([_shown(point.gold)] if point.gold is not None else [])
        table.add_row(f"{point.n:,}", f"{point.kl_bound:.2f} nats", *cells)
    return table


def _shown(one: Estimate) -> str:
    return f"{one.value:.2f} ({one.low:.2f} to {one.high:.2f})"
