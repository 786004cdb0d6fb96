"""A picture of the curves of a PPO run, where matplotlib is installed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.plotting import BLUE, GRAY, MUTED, ORANGE, has_matplotlib, new_picture, prepare, save
from rlhf_cli.progress import say
from rlhf_cli.training.monitoring.panels import PANELS, Panel, Trace, trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 4
_WIDTH, _HEIGHT = 3.7, 3.1
"""Size of a plot, in inches."""

Rows = Sequence[Mapping[str, Any]]


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
    found = [(panel, trace(rows, panel)) for panel in PANELS["ppo"]]
    traces = [(panel, one) for panel, one in found if one is not None]
    if not traces:
        return False
    count = len(traces) + 2  # the last one is the legend
    columns = min(_COLUMNS, count)
    lines = -(-count // columns)
    picture = new_picture(_WIDTH * columns, _HEIGHT * lines, title)
    grid = list(picture.subplots(lines, columns, squeeze=False).flat)
    for axes, (panel, one) in zip(grid, traces, strict=False):
        _draw(axes, panel, one, rows)
    _against_kl(grid[len(traces)], rows)
    for axes in grid[count - 1 :]:
        axes.set_axis_off()
    named = {}
    for axes in grid:
        handles, names = axes.get_legend_handles_labels()
        named |= dict(zip(names, handles, strict=True))
    grid[count - 1].legend(list(named.values()), list(named), loc="center left", fontsize=9, frameon=False)
    save(picture, path)
    return True


def _draw(axes: Axes, panel: Panel, found: Trace, rows: Rows) -> None:
    from matplotlib.ticker import MaxNLocator

    prepare(axes, panel.title, "step", panel.unit)
    if panel.spread is not None:
        _band(axes, found, {row["step"]: row.get(panel.spread) for row in rows})
    steps, values = zip(*found.smooth, strict=True)
    is_smooth = found.smooth != found.raw
    if is_smooth:
        axes.plot(*zip(*found.raw, strict=True), color=MUTED, linewidth=0.8, label="one step")
    marker = "." if len(steps) < 3 else ""
    axes.plot(
        steps, values, color=BLUE, linewidth=1.8, marker=marker, label="running mean" if is_smooth else "training"
    )
    if found.held_out:
        steps, values = zip(*found.held_out, strict=True)
        axes.plot(steps, values, color=ORANGE, linewidth=1.2, marker="o", markersize=4, label="held out")
    for value in panel.shows:
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, value), max(high, value))
    _mark(axes, panel)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _band(axes: Axes, found: Trace, spread: Mapping[int, float | None]) -> None:
    """Draw one standard deviation of a step's completions to either side."""
    points = [(step, value, spread.get(int(step))) for step, value in found.raw]
    known = [(step, value - width, value + width) for step, value, width in points if width is not None]
    if known:
        steps, low, high = zip(*known, strict=True)
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.12, linewidth=0, label="spread within a step")


def _mark(axes: Axes, panel: Panel) -> None:
    """Draw the dashed line where it is within the axis."""
    low, high = axes.get_ylim()
    if panel.mark is not None and low < panel.mark[0] < high:
        height, label = panel.mark
        axes.axhline(height, color=GRAY, linewidth=0.9, linestyle="--")
        axes.text(0.99, height, label, transform=axes.get_yaxis_transform(), ha="right", va="bottom",
                  color=GRAY, fontsize=8)  # fmt: skip


def _against_kl(axes: Axes, rows: Rows) -> None:
    """Draw the reward over the square root of the KL, in which it is smooth (Gao et al. 2022, arXiv:2210.10760)."""
    prepare(axes, "Reward against √KL", "√KL, square root of nats per completion", "reward")
    for kl, reward, color, size in (
        ("objective/kl", "objective/scores", BLUE, 8),
        ("eval/objective/kl", "eval/objective/scores", ORANGE, 16),
    ):
        found = [(row[kl], row[reward]) for row in rows if row.get(kl) is not None and row.get(reward) is not None]
        axes.scatter(
            [math.sqrt(max(0.0, x)) for x, _ in found], [y for _, y in found], s=size, color=color, linewidths=0
        )
