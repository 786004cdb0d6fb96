"""Charts of a report: training curves, reward against KL, and the quality of the reward model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_cli.charts.chart import Chart, Series
from rlhf_cli.report.gather import RunFiles
from rlhf_cli.training.monitoring import stage_charts
from rlhf_cli.training.monitoring.stage_charts import RunCurves


def training_charts(runs: Sequence[RunFiles], stage: str) -> list[Chart]:
    """Return the curves of a stage; of several runs, the smoothed curve of each."""
    return stage_charts.panel_charts(_curves(runs, stage), stage)


def reward_against_kl(runs: Sequence[RunFiles]) -> Chart | None:
    """Return reward over the square root of the KL: of training, of held-out evaluations, and of best-of-n."""
    more = _best_of_n(runs[0].best_of_n) if len(runs) == 1 else []
    return stage_charts.reward_against_kl(_curves(runs, "ppo"), more)


def _curves(runs: Sequence[RunFiles], stage: str) -> list[RunCurves]:
    return [RunCurves(run.name, run.metrics.get(stage, ()), run.group % 5) for run in runs]


def _best_of_n(found: Mapping[str, Any] | None) -> list[Series]:
    """Return the curves of best-of-n; their KL is an upper bound."""
    points = [] if found is None else found["points"]
    series = []
    for name, label, color in (("reward", "best of n (KL at most)", 2), ("gold", "best of n, gold", 3)):
        known = [(math.sqrt(one["kl_upper_bound"]), one[name]) for one in points if one.get(name) is not None]
        intervals = [(x, one["low"], one["high"]) for x, one in known if one.get("low") is not None]
        series.append(Series(label, [(x, one["value"]) for x, one in known], color, "both", intervals=intervals))
    return series
