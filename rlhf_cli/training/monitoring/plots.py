"""A picture of the curves of a PPO run, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.progress import say
from rlhf_cli.training.monitoring.curves import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RAW, _SMOOTH, _EVALUATED, _BOUND = "#9bbcd8", "#1f5a8c", "#d1622b", "#8a8a8a"


@dataclass(frozen=True)
class _Panel:
    """One plot of the picture.

    Attributes:
        title: of the plot.
        unit: of the vertical axis.
        metric: name in `metrics.jsonl`.
        evaluated: metric of held-out prompts in the same plot.
        bound: height of a dashed line, and its label.
        spread: name of the metric's standard deviation, drawn as a band.
        span: smallest range of the axis, so that noise does not fill it.
    """

    title: str
    unit: str
    metric: str
    evaluated: str | None = None
    bound: tuple[float, str] | None = None
    spread: str | None = None
    span: tuple[float, float] | None = None


_PANELS = (
    _Panel("reward", "mean of completions", "objective/scores", "eval/objective/scores", spread="objective/scores_std"),
    _Panel("KL to the SFT model", "nats per completion", "objective/kl", "eval/objective/kl", span=(0.0, 1.0)),
    _Panel("length", "tokens", "length/mean", "eval/length/mean", span=(0.0, 1.0)),
    _Panel("entropy", "nats per token", "policy/entropy_avg", span=(0.0, 0.1)),
    _Panel("clipped", "fraction of tokens", "policy/clipfrac_avg", bound=(0.2, "steps too large"), span=(0.0, 0.05)),
    _Panel("explained variance", "fraction", "val/explained_variance", bound=(0.0, "as good as a constant")),
)


def draw_curves(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> bool:
    """Draw reward, KL, length, entropy, clip fraction and explained variance over the steps.

    Args:
        rows: rows of a `metrics.jsonl`.
        path: of the PNG file.
        title: title of the picture.

    Returns:
        Whether the picture was drawn: not without matplotlib, which a message says, nor for a run without steps.
    """
    if find_spec("matplotlib") is None:
        say(f"no {path.name}: matplotlib is not installed (`pip install 'rlhf-cli[plots]'`)")
        return False
    if not any(len(Curve.of(rows, panel.metric)) for panel in _PANELS):
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, without pyplot: no window system, and nothing to close.
    picture = Figure(figsize=(12, 6.4), layout="constrained")
    for number, panel in enumerate(_PANELS):
        _draw(picture.add_subplot(2, 3, number + 1), panel, rows)
    picture.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", parse_math=False)
    legends = (axes.get_legend_handles_labels() for axes in picture.axes)
    named = {name: handle for handles, names in legends for handle, name in zip(handles, names, strict=True)}
    picture.legend(
        list(named.values()), list(named), loc="upper right", bbox_to_anchor=(0.995, 1.0), ncols=4, fontsize=8,
        frameon=False,
    )  # fmt: skip
    FigureCanvasAgg(picture)
    picture.savefig(path, dpi=110, metadata={"Software": None})
    return True


def _draw(axes: Axes, panel: _Panel, rows: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    curve = Curve.of([row for row in rows if row["step"] > 0], panel.metric)
    evaluated = Curve.of(rows, panel.evaluated) if panel.evaluated is not None else Curve((), ())
    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold")
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    if not len(curve):
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=_BOUND)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    width = max(1, len(curve) // 15)
    # A short run needs no smoothing.
    marker = "." if len(curve) < 3 else ""
    if panel.spread is not None:
        _band(axes, curve, {row["step"]: row.get(panel.spread) for row in rows})
    if width > 1:
        axes.plot(curve.steps, curve.values, color=_RAW, linewidth=0.9, label="one step")
    name = "one step" if width == 1 else f"mean of {2 * (width // 2) + 1} steps"
    axes.plot(curve.steps, curve.running_mean(width), color=_SMOOTH, linewidth=1.8, marker=marker, label=name)
    if len(evaluated):
        axes.plot(evaluated.steps, evaluated.values, color=_EVALUATED, linewidth=1.2, marker="o", markersize=4,
                  label="held-out prompts")  # fmt: skip
    if panel.span is not None:
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, panel.span[0]), max(high, panel.span[1]))
    _bound(axes, panel)
    axes.set_xlabel("step", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _band(axes: Axes, curve: Curve, spread: Mapping[int, float | None]) -> None:
    """Draw one standard deviation of a step's completions to either side."""
    points = [(step, value, spread.get(step)) for step, value in curve]
    known = [(step, value - width, value + width) for step, value, width in points if width is not None]
    if known:
        steps, low, high = zip(*known, strict=True)
        axes.fill_between(steps, low, high, color=_RAW, alpha=0.25, linewidth=0, label="spread within a step")


def _bound(axes: Axes, panel: _Panel) -> None:
    """Draw the dashed line where it is within the axis."""
    low, high = axes.get_ylim()
    if panel.bound is not None and low < panel.bound[0] < high:
        height, word = panel.bound
        axes.axhline(height, color=_BOUND, linewidth=0.9, linestyle="--")
        axes.text(0.99, height, word, transform=axes.get_yaxis_transform(), ha="right", va="bottom",
                  color=_BOUND, fontsize=8)  # fmt: skip
