"""A picture of the curves of a PPO run, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path

from rlhf_cli.plotting import has_matplotlib, new_picture, save
from rlhf_cli.progress import say
from rlhf_cli.training.monitoring.stage_charts import (
    COLORS,
    Rows,
    RunCurves,
    panel_charts,
    reward_against_kl,
)

_COLUMNS = 3
_WIDTH, _HEIGHT = 4.4, 3.0
"""Size of a plot, in inches."""


def draw_curves(rows: Rows, path: Path, *, title: str) -> bool:
    """Draw what `PANELS` names of PPO over its steps, and the reward over the square root of the KL.

    Args:
        rows: rows of a `metrics.jsonl`.
        path: of the PNG file.
        title: title of the picture.

    Returns:
        Whether the picture was drawn: not without matplotlib, which a message says, nor for a run without steps.
    """
    if not has_matplotlib():
        say(f"no {path.name}: matplotlib is not installed (`pip install 'rlhf-cli[plots]'`)")
        return False
    from rlhf_cli.charts.png import draw

    runs = [RunCurves("", rows)]
    against = reward_against_kl(runs)
    charts = [*panel_charts(runs, "ppo"), *([] if against is None else [against])]
    if not charts:
        return False
    columns = min(_COLUMNS, len(charts))
    lines = -(-len(charts) // columns)
    picture = new_picture(_WIDTH * columns, _HEIGHT * lines + 0.4, title)
    picture.supxlabel(COLORS, fontsize=8, x=0.01, ha="left")
    grid = list(picture.subplots(lines, columns, squeeze=False).flat)
    for axes, chart in zip(grid, charts, strict=False):
        draw(axes, chart, title=chart.title)
    for axes in grid[len(charts) :]:
        axes.set_axis_off()
    save(picture, path)
    return True
