"""Plots proxy and gold reward against the distance to the initial policy; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlhf_cli.overopt.results import Optimized, Result
from rlhf_cli.plotting import BLUE, GRAY, ORANGE, has_matplotlib, new_picture, prepare, save
from rlhf_cli.progress import say

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROWS = ("best of n", "PPO")


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw one picture per noise, with a column per size of the proxy; return their paths.

    Args:
        results: of all proxies.
        folder: of the pictures `overopt-noise-0.2.png`.

    Returns:
        Nothing without matplotlib, which a message says.
    """
    if not has_matplotlib():
        say("no plots: matplotlib is not installed (`pip install 'rlhf-cli[plots]'`)")
        return []
    paths = []
    for noise in sorted({result.proxy.noise for result in results}):
        path = folder / f"overopt-noise-{noise:g}.png"
        _picture([result for result in results if result.proxy.noise == noise], path, noise)
        paths.append(path)
    return paths


def _picture(results: Sequence[Result], path: Path, noise: float) -> None:
    columns = len(results)
    seeds = len(results[0].best_of_n.course.kl)
    title = f"Proxies of a gold reward, {noise:.0%} of labels swapped, {seeds} seed{'s' if seeds > 1 else ''}"
    picture = new_picture(0.8 + 3.7 * columns, 6.6, title)
    grid = picture.subplots(2, columns, squeeze=False, sharey="row", sharex="row")
    for column, result in enumerate(results):
        for row, optimized in enumerate((result.best_of_n, result.ppo)):
            _panel(grid[row][column], optimized, f"{_ROWS[row]}, {result.proxy.labels:,} labels")
    for row in range(2):
        grid[row][0].set_ylabel("reward gained", fontsize=9)
    legends = [axes.get_legend_handles_labels() for axes in picture.axes]
    named = {name: handle for handles, names in legends for handle, name in zip(handles, names, strict=True)}
    picture.legend(
        list(named.values()), list(named), loc="outside lower center", ncols=5, fontsize=8, frameon=False
    )  # fmt: skip
    save(picture, path)


def _panel(axes: Axes, optimized: Optimized | None, title: str) -> None:
    prepare(axes, title)
    axes.axhline(0.0, color=GRAY, linewidth=0.6)
    if optimized is None:
        axes.text(0.5, 0.5, "diverged", transform=axes.transAxes, ha="center", va="center", color=GRAY)
        return
    is_bound = optimized.method == "best-of-n"
    axes.set_xlabel("sqrt(KL), upper bound, sqrt(nats)" if is_bound else "sqrt(KL), sqrt(nats)", fontsize=9)
    distance = np.sqrt(np.maximum([one.value for one in optimized.kl], 0.0))
    for name, color, points in (("proxy", BLUE, optimized.proxy), ("gold", ORANGE, optimized.gold)):
        axes.plot(distance, [one.value for one in points], color=color, marker="o", markersize=3.5, linewidth=1.2,
                  label=name)  # fmt: skip
        axes.fill_between(distance, [one.low for one in points], [one.high for one in points], color=color,
                          alpha=0.18, linewidth=0)  # fmt: skip
    if (fitted := optimized.fit) is None:
        return
    along = np.linspace(0.0 if is_bound else 1.0, fitted.farthest, 100)
    axes.plot(along, fitted.at(along), color=ORANGE, linestyle="--", linewidth=1.4, label="fit of gold")
    if fitted.turns_over and not fitted.falls_from_start:
        axes.axvline(fitted.peak.value, color=GRAY, linestyle=":", linewidth=1.4, label="gold is highest, 95 %")
        axes.axvspan(fitted.peak.low, min(fitted.peak.high, fitted.farthest), color=GRAY, alpha=0.12, linewidth=0)
