"""Charts as PNG files, with matplotlib, in the style and with the axes of `svg`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlhf_cli.charts.chart import Chart, Series
from rlhf_cli.plotting import BLUE, GRAY, GREEN, MUTED, ORANGE, PURPLE, new_picture, prepare, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = (BLUE, ORANGE, GREEN, PURPLE, GRAY)
"""By the number of a series' color."""
_WIDTH, _HEIGHT = 6.4, 3.6
"""Size of a chart in a file of its own, in inches."""
_LEFT, _BOTTOM, _TOP, _LINE, _CHARACTER = 0.72, 0.52, 0.42, 0.15, 0.08
"""Margins, height of a line of the caption and width of a character of a name, in inches."""
_CAPTION = 96
"""Characters of a line of the caption."""
_NAME = 0.07
"""Height of a name, as a share of the vertical axis."""


def write_png(chart: Chart, path: Path) -> None:
    """Write a chart with its title and caption; equal charts give equal bytes. Needs matplotlib.

    Raises:
        OSError: the file cannot be written.
    """
    picture = new_picture(_WIDTH, _HEIGHT, chart.spoken)
    caption = textwrap.wrap(chart.caption, _CAPTION)
    longest = max(len(one.name) for one in chart.drawn)
    picture.set_layout_engine(None)  # it would draw everything twice
    picture.subplots_adjust(
        left=_LEFT / _WIDTH,
        right=1 - max(0.15, min(2.2, 0.1 + _CHARACTER * longest)) / _WIDTH,
        bottom=_BOTTOM / _HEIGHT,
        top=1 - (_TOP + _LINE * len(caption)) / _HEIGHT,
    )
    axes = picture.subplots()
    draw(axes, chart)
    axes.set_title("\n".join(caption), loc="left", fontsize=8, color=GRAY, parse_math=False)
    save(picture, path)


def draw(axes: Axes, chart: Chart, *, title: str = "") -> None:
    """Draw a chart.

    Args:
        axes: of a picture.
        chart: to draw.
        title: above it.
    """
    prepare(axes, title, chart.x, chart.y)
    axes.grid(visible=False, axis="x")
    axes.set_xlim(*chart.x_span)
    axes.set_ylim(*chart.y_span)
    axes.set_xticks(*_ticks(chart.x_ticks))
    axes.set_yticks(*_ticks(chart.y_ticks))
    if chart.diagonal:
        axes.plot(chart.diagonal_ends, chart.diagonal_ends, color=GRAY, linewidth=0.9, linestyle="--")
    for mark in chart.seen_marks:
        axes.axhline(mark.value, color=GRAY, linewidth=0.9, linestyle="--")
        across = axes.get_yaxis_transform()
        axes.text(0.99, mark.value, mark.label, transform=across, ha="right", va="bottom", color=GRAY, fontsize=8)
    for one in chart.drawn:
        _series(axes, one)
    anchor = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center"}
    for one, share in chart.names(_NAME):
        style = {"color": _color(one.color), "fontsize": 8, "fontweight": "bold", "parse_math": False}
        axes.annotate(one.name, (1.0, share), (5, 0), **anchor, **style)


def _series(axes: Axes, one: Series) -> None:
    color = _color(one.color)
    if one.band:
        steps, lower, upper = _columns(one.band)
        axes.fill_between(steps, lower, upper, color=color, alpha=0.12, linewidth=0)
    for at, low, high in one.intervals:
        axes.plot([at, at], [low, high], color=color, linewidth=1.1, clip_on=False)
    has_line = one.kind != "dots" and len(one.points) > 1
    has_dots = one.kind != "line" or len(one.points) == 1
    width = 0.9 if one.color == "muted" else 1.6
    # Dots at the end of an axis are drawn whole.
    axes.plot(*_columns(one.points), color=color, linewidth=width if has_line else 0.0,
              marker="o" if has_dots else "", markersize=4, clip_on=not has_dots)  # fmt: skip


def _color(color: int | Literal["muted"]) -> str:
    return MUTED if color == "muted" else COLORS[color]


def _columns(rows: Sequence[tuple[float, ...]]) -> list[list[float]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _ticks(found: Sequence[tuple[float, str]]) -> tuple[list[float], list[str]]:
    return [value for value, _ in found], [name for _, name in found]
