"""The result of a study: curves with intervals, fits, and where to stop, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from rlhf_cli.overopt.measurements import Course
from rlhf_cli.overopt.recipes import Proxy
from rlhf_cli.statistics.overoptimization import Estimate, Fit, Method, fit, mean_over_seeds_and_prompts


@dataclass(frozen=True)
class Optimized:
    """One proxy, optimized in one way.

    Attributes:
        method: how.
        course: what was measured.
        fit: of the gold reward's gain, over all seeds; None with too few points.
        by_seed: of each seed alone.
        kl: per point.
        proxy: mean gain of the proxy's reward per point.
        gold: mean gain of the gold reward per point.
    """

    method: Method
    course: Course
    fit: Fit | None
    by_seed: Sequence[Fit | None]
    kl: Sequence[Estimate]
    proxy: Sequence[Estimate]
    gold: Sequence[Estimate]

    @staticmethod
    def of(method: Method, course: Course) -> Optimized:
        """Fit and summarize a course."""
        return Optimized(
            method,
            course,
            fit(method, course.kl, course.gain),
            [fit(method, course.kl[[s]], course.gain[[s]]) for s in range(len(course.kl))],
            mean_over_seeds_and_prompts(course.kl),
            mean_over_seeds_and_prompts(course.proxy_gain),
            mean_over_seeds_and_prompts(course.gain),
        )

    @property
    def stop(self) -> int | None:
        """Position of the last point before the gold reward of the curve falls; None if it does not fall."""
        if self.fit is None or not self.fit.turns_over:
            return None
        before = [position for position, kl in enumerate(self.kl) if max(kl.value, 0.0) ** 0.5 <= self.fit.peak.value]
        return before[-1] if before else 0

    @property
    def lost(self) -> Estimate | None:
        """Gold reward measured at `stop` minus that at the last point; None if the curve does not fall."""
        if self.stop is None:
            return None
        gold = self.course.gold
        return mean_over_seeds_and_prompts(gold[:, :, [self.stop]] - gold[:, :, [-1]])[0]

    def said(self) -> str:
        """Return in words where to stop."""
        if self.fit is None:
            return "too few points for a fit"
        if self.stop is None or self.lost is None:
            return self.fit.said()
        point = self.course.points[self.stop]
        unit = f"n = {point:,}" if self.method == "best-of-n" else f"step {point:,}"
        lost = f"{self.lost.value:.2f} ({self.lost.low:.2f} to {self.lost.high:.2f})"
        return f"{self.fit.said()}: stop at {unit}; optimizing further costs {lost} of the gold reward"

    def to_json(self) -> dict[str, Any]:
        """Return plain values; rewards are relative to the initial policy, intervals 95 % over seeds and prompts."""
        names = "n" if self.method == "best-of-n" else "step"
        kl = "kl_upper_bound" if self.method == "best-of-n" else "kl"
        points = [
            {names: point, kl: one.to_json(), "proxy": proxy.to_json(), "gold": gold.to_json()}
            for point, one, proxy, gold in zip(self.course.points, self.kl, self.proxy, self.gold, strict=True)
        ]
        stop = {
            "at": None if self.stop is None else self.course.points[self.stop],
            "kl": None if self.stop is None or self.fit is None else self.fit.peak.value**2,
            "gold_lost_after": None if self.lost is None else self.lost.to_json(),
            "said": self.said(),
        }
        return {
            "points": points,
            "fit": None if self.fit is None else self.fit.to_json(),
            "fit_by_seed": [None if one is None else one.to_json() for one in self.by_seed],
            "stop": stop,
        }


@dataclass(frozen=True)
class Result:
    """What a study found about one proxy.

    Attributes:
        proxy: the proxy.
        accuracy: share of the gold preferences of held-out prompts that it predicts, per seed; None if not measured.
        best_of_n: the proxy optimized by best of n.
        ppo: the proxy optimized by PPO; None if PPO diverged in every seed.
        diverged: seeds whose PPO diverged; they do not count in `ppo`.
    """

    proxy: Proxy
    accuracy: Sequence[float | None]
    best_of_n: Optimized
    ppo: Optimized | None
    diverged: Sequence[int]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "labels": self.proxy.labels,
            "multiple": self.proxy.multiple,
            "noise": self.proxy.noise,
            "accuracy": list(self.accuracy),
            "best_of_n": self.best_of_n.to_json(),
            "ppo": None if self.ppo is None else self.ppo.to_json(),
            "diverged_seeds": list(self.diverged),
        }


def table(results: Sequence[Result]) -> Table:
    """Return one row per proxy and way of optimization, in 80 columns.

    `acc.` is the accuracy on held-out prompts. KL, proxy and gold are those of the last point; `turns` is the share of
    resamples in which gold turns over.
    """
    rows = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("labels", "noise", "acc."):
        rows.add_column(name, justify="right", no_wrap=True)
    rows.add_column("by", no_wrap=True)
    for name in ("KL", "proxy", "gold"):
        rows.add_column(name, justify="right", no_wrap=True)
    for name in ("gold highest at KL", "turns", "stop at"):
        rows.add_column(name, no_wrap=True)
    for result in results:
        known = [one for one in result.accuracy if one is not None]
        accuracy = f"{sum(known) / len(known):.0%}" if known else "?"
        proxy = (f"{result.proxy.labels:,}", f"{result.proxy.noise:.0%}", accuracy)
        rows.add_row(*proxy, "best of n", *_cells(result.best_of_n))
        rows.add_row("", "", "", "ppo", *(("diverged",) if result.ppo is None else _cells(result.ppo)))
    return rows


def _cells(one: Optimized) -> tuple[str, ...]:
    ends = (f"{one.kl[-1].value:.1f}", f"{one.proxy[-1].value:+.2f}", f"{one.gold[-1].value:+.2f}")
    if (fitted := one.fit) is None:
        return (*ends, "too few points")
    turned = f"{fitted.turned:.0%}"
    if one.stop is None:
        return (*ends, f"not up to {fitted.farthest**2:.1f}", turned)
    if fitted.falls_from_start:
        return (*ends, "at the start", turned, "the start")
    high = "end" if fitted.peak.high >= fitted.farthest else f"{fitted.peak.high**2:.1f}"
    point = f"{'n =' if one.method == 'best-of-n' else 'step'} {one.course.points[one.stop]:,}"
    return (*ends, f"{fitted.peak.value**2:.1f} ({fitted.peak.low**2:.1f} to {high})", turned, point)
