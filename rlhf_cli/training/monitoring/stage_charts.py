"""Charts of a stage's metrics over its steps: of one run with its noise, or of several runs by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cli.charts.chart import Chart, Interval, Mark, Point, Series
from rlhf_cli.training.monitoring.panels import PANELS, Panel, thinned, trace

Rows = Sequence[Mapping[str, Any]]

COLORS = "Gray: single steps. Blue: running mean, with the spread within a step where known. Orange: held-out prompts."
CAPTIONS = "Numbers: means of the first and last tenth."
_POINTS = 400
"""Points of a curve: more cannot be seen."""


@dataclass(frozen=True)
class RunCurves:
    """Metrics of a run.

    Attributes:
        name: of the run, shown where there are several.
        rows: of the `metrics.jsonl` of a stage.
        color: number of its color.
    """

    name: str
    rows: Rows
    color: int = 0


def panel_charts(runs: Sequence[RunCurves], stage: str) -> list[Chart]:
    """Return what `PANELS` names of a stage; of several runs, the smoothed curve of each."""
    found = [_panel(runs, stage, panel) for panel in PANELS[stage]]
    return [chart for chart in found if chart.drawn]


def _panel(runs: Sequence[RunCurves], stage: str, panel: Panel) -> Chart:
    series: list[Series] = []
    captions = []
    is_single = len(runs) == 1
    for run in runs:
        found = trace(run.rows, panel)
        if found is None:
            continue
        if is_single and found.smooth != found.raw:
            series.append(Series("", thinned(found.raw, _POINTS), "muted"))
        name, color = ("training", 0) if is_single else (run.name, run.color)
        band = thinned(_spread(found.raw, panel, run.rows), _POINTS) if is_single else ()
        series.append(Series(name, thinned(found.smooth, _POINTS), color, band=band))
        if found.held_out and is_single:
            series.append(Series("held out", found.held_out, 1, "both"))
        captions.append(found.caption)
    return Chart(
        panel.title,
        f"{panel.unit}: {'; '.join(captions)}" if len(runs) <= 2 else panel.unit,
        series,
        x="step",
        y=panel.unit,
        subject=stage,
        marks=() if panel.mark is None else (Mark(*panel.mark),),
        shows=panel.shows,
        has_whole_x=True,
    )


def _spread(raw: Sequence[Point], panel: Panel, rows: Rows) -> list[Interval]:
    """Return one standard deviation of a step's completions to either side of their mean."""
    widths = {} if panel.spread is None else {row["step"]: row.get(panel.spread) for row in rows}
    known = [(step, value, widths.get(int(step))) for step, value in raw]
    return [(step, value - width, value + width) for step, value, width in known if width is not None]


def reward_against_kl(runs: Sequence[RunCurves], more: Sequence[Series] = ()) -> Chart | None:
    """Return reward over the square root of the KL: of training, and of a single run also on held-out prompts.

    In Gao et al. 2022 (arXiv:2210.10760), both PPO and best-of-n are smooth in this quantity.

    Args:
        runs: rows of PPO.
        more: further series of a single run.
    """
    chart = Chart(
        "Reward against the square root of the KL",
        "Each dot is a step; further right is further from the starting model.",
        [*_against_kl(runs), *more],
        x="√KL, square root of nats per completion",
        y="reward",
        subject="ppo",
    )
    return chart if chart.drawn else None


def _against_kl(runs: Sequence[RunCurves]) -> Iterator[Series]:
    for run in runs:
        if len(runs) > 1:
            yield Series(run.name, _rewards(run.rows, ""), run.color, "dots")
        else:
            yield Series("training", _rewards(run.rows, ""), 0, "dots")
            yield Series("held out", _rewards(run.rows, "eval/"), 1, "both")


def _rewards(rows: Rows, prefix: str) -> list[Point]:
    found = [(row.get(f"{prefix}objective/kl"), row.get(f"{prefix}objective/scores")) for row in rows]
    points = [(math.sqrt(max(0.0, a)), b) for a, b in found if isinstance(a, float) and isinstance(b, float)]
    return thinned(sorted(points), _POINTS)
