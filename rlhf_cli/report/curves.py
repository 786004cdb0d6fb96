"""Figures of a report: training curves, reward against KL, and the calibration of the reward model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cli.report.charts import Mark, Series, chart
from rlhf_cli.report.gather import RunFiles
from rlhf_cli.training.monitoring.curves import Curve

_POINTS = 400
"""Points of a curve on the page: more cannot be seen."""


@dataclass(frozen=True)
class Picture:
    """A chart with its caption: a title, and what is seen."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Panel:
    """One figure over the steps of a stage.

    Attributes:
        title: of the figure.
        unit: of the vertical axis.
        metric: in `metrics.jsonl`.
        evaluated: metric of held-out data in the same figure.
        mark: a height that is drawn, with its label.
        shows: values that the axis includes.
    """

    title: str
    unit: str
    metric: str
    evaluated: str | None = None
    mark: tuple[float, str] | None = None
    shows: tuple[float, ...] = ()


PANELS: Mapping[str, tuple[Panel, ...]] = {
    "ppo": (
        Panel("Reward", "mean of completions", "objective/scores", "eval/objective/scores"),
        Panel("KL", "nats per completion", "objective/kl", "eval/objective/kl", shows=(0.0,)),
        Panel("Length", "tokens", "length/mean", "eval/length/mean", shows=(0.0,)),
        Panel("Entropy", "nats per token", "policy/entropy_avg", shows=(0.0,)),
        Panel("Clipped", "share of tokens", "policy/clipfrac_avg", mark=(0.2, "steps too large"), shows=(0.0,)),
        Panel(
            "Critic", "explained variance", "val/explained_variance", mark=(0.0, "as good as a constant"), shows=(0.0,)
        ),
    ),
    "train-rm": (
        Panel("Loss", "nats per pair", "loss", "eval/loss", mark=(math.log(2), "chance")),
        Panel("Accuracy", "share of pairs", "accuracy", "eval/accuracy", mark=(0.5, "chance"), shows=(0.5,)),
    ),
    "sft": (Panel("Loss", "nats per token", "loss", "eval/loss"),),
}


@dataclass(frozen=True)
class Trace:
    """A metric over the steps of a stage.

    Attributes:
        raw: (step, value) of each step.
        smooth: the same as a running mean, over a fifteenth of the steps.
        held_out: (step, value) of held-out data.
        caption: where it began and where it is, as means over a tenth of the steps.
    """

    raw: Sequence[tuple[float, float]]
    smooth: Sequence[tuple[float, float]]
    held_out: Sequence[tuple[float, float]]
    caption: str


def trace(rows: Sequence[Mapping[str, Any]], panel: Panel) -> Trace | None:
    """Return what a panel shows of rows of a `metrics.jsonl`; None if they do not have its metric."""
    curve = Curve.of([row for row in rows if row["step"] > 0], panel.metric)
    if not len(curve):
        return None
    smooth = zip(curve.steps, curve.running_mean(max(1, len(curve) // 15)), strict=True)
    held_out = [] if panel.evaluated is None else list(Curve.of(rows, panel.evaluated))
    return Trace(
        list(curve), list(smooth), held_out, f"{_value(curve.first(0.1).mean)} → {_value(curve.last(0.1).mean)}"
    )


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
            series.append(Series("", _thinned(found.raw), "muted"))
        name = run.name if len(runs) > 1 else "training"
        series.append(Series(name, _thinned(found.smooth), run.group % 5, "line"))
        if found.held_out and len(runs) == 1:
            series.append(Series("held out", found.held_out, 1, "both"))
        captions.append(found.caption)
    mark = () if panel.mark is None else (Mark(*panel.mark),)
    title = f"{panel.title} of {stage} by step"
    svg = chart(series, title=title, x="step", y=panel.unit, marks=mark, shows=panel.shows, has_whole_x=True)
    seen = f"{panel.unit}: {'; '.join(captions)}" if len(runs) <= 2 else panel.unit
    return Picture(panel.title, seen, svg) if svg else None


def _value(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    step = max(1, -(-len(points) // _POINTS))
    return [*points[::step], *(points[-1:] if (len(points) - 1) % step else ())]


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
    return _thinned(sorted(points))


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
