"""Figures of a report: training curves, reward against KL, and the calibration of the reward model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cli.report.charts import Mark, Series, chart
from rlhf_cli.report.gather import RunFiles
from rlhf_cli.training.monitoring.panels import PANELS, Panel, thinned, trace

_POINTS = 400
"""Points of a curve on the page: more cannot be seen."""


@dataclass(frozen=True)
class Picture:
    """A chart with its caption: a title, and what is seen."""

    title: str
    caption: str
    svg: str


def training_charts(runs: Sequence[RunFiles], stage: str) -> list[Picture]:
    """Return the curves of a stage; of several runs, the smoothed curve of each."""
    found = [_panel(runs, stage, panel) for panel in PANELS[stage]]
    return [picture for picture in found if picture is not None]


def _panel(runs: Sequence[RunFiles], stage: str, panel: Panel) -> Picture | None:
    series: list[Series] = []
    captions = []
    for run in runs:
        found = trace(run.metrics.get(stage, ()), panel)
        if found is None:
            continue
        if len(runs) == 1 and found.smooth != found.raw:
            series.append(Series("", thinned(found.raw, _POINTS), "muted"))
        name = run.name if len(runs) > 1 else "training"
        series.append(Series(name, thinned(found.smooth, _POINTS), run.group % 5, "line"))
        if found.held_out and len(runs) == 1:
            series.append(Series("held out", found.held_out, 1, "both"))
        captions.append(found.caption)
    mark = () if panel.mark is None else (Mark(*panel.mark),)
    title = f"{panel.title} of {stage} by step"
    svg = chart(series, title=title, x="step", y=panel.unit, marks=mark, shows=panel.shows, has_whole_x=True)
    seen = f"{panel.unit}: {'; '.join(captions)}" if len(runs) <= 2 else panel.unit
    return Picture(panel.title, seen, svg) if svg else None


def reward_against_kl(runs: Sequence[RunFiles]) -> Picture | None:
    """Return reward over the square root of the KL: of training, of held-out evaluations, and of best-of-n.

    In Gao et al. 2022 (arXiv:2210.10760), both PPO and best-of-n are smooth in this quantity.
    """
    series: list[Series] = []
    for run in runs:
        name = run.name if len(runs) > 1 else "training"
        series.append(Series(name, _against_kl(run, "objective/kl", "objective/scores"), run.group % 5, "dots"))
        if len(runs) == 1:
            held_out = _against_kl(run, "eval/objective/kl", "eval/objective/scores")
            series.append(Series("held out", held_out, 1, "both"))
            series += _best_of_n(run.best_of_n)
    title, x = "Reward against the square root of the KL", "√KL, square root of nats per completion"
    svg = chart(series, title=title, x=x, y="reward")
    if not svg:
        return None
    return Picture(title, "Each dot is a step; further right is further from the starting model.", svg)


def _against_kl(run: RunFiles, kl: str, reward: str) -> list[tuple[float, float]]:
    rows = run.metrics.get("ppo", ())
    found = [(row.get(kl), row.get(reward)) for row in rows]
    points = [(math.sqrt(max(0.0, a)), b) for a, b in found if isinstance(a, float) and isinstance(b, float)]
    return thinned(sorted(points), _POINTS)


def _best_of_n(found: Mapping[str, Any] | None) -> list[Series]:
    """Return the curves of best-of-n; their KL is an upper bound."""
    points = [] if found is None else found["points"]
    series = []
    for name, label, color in (("reward", "best of n (KL at most)", 2), ("gold", "best of n, gold", 3)):
        known = [(math.sqrt(one["kl_upper_bound"]), one[name]) for one in points if one.get(name) is not None]
        intervals = [(x, one["low"], one["high"]) for x, one in known if one.get("low") is not None]
        values = [(x, one["value"]) for x, one in known]
        if values:
            series.append(Series(label, values, color, "both", intervals=intervals))
    return series


def quality_charts(run: RunFiles) -> list[Picture]:
    """Return the reliability plot of the reward model."""
    if run.quality is None or not run.quality.get("reliability"):
        return []
    bins = [one for one in run.quality["reliability"] if one.get("accuracy", {}).get("value") is not None]
    points = [(one["mean"], one["accuracy"]["value"]) for one in bins]
    intervals = [(one["mean"], one["accuracy"]["low"], one["accuracy"]["high"]) for one in bins]
    title = "Is its confidence right?"
    svg = chart(
        [Series("", points, 0, "both", intervals=intervals)],
        title="Accuracy of the reward model by its confidence",
        x="confidence: sigmoid of the difference of two rewards",
        y="accuracy, share of pairs",
        shows=(0.5, 1.0),
        diagonal=True,
    )
    caption = "On the dashed line, pairs of which it is 80 % sure are right 80 % of the time; below it, it is too sure."
    return [Picture(title, caption, svg)] if svg else []
