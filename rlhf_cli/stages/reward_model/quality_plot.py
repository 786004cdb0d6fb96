"""A picture of a reward model's quality on held-out pairs, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.progress import say
from rlhf_cli.rewards.estimates import Measured
from rlhf_cli.stages.reward_model.evaluation import Bin, RankingReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GRAY = "#1f5a8c", "#d1622b", "#8a8a8a"


def draw_quality(report: RankingReport, path: Path, *, title: str) -> bool:
    """Draw the reliability of confidences, accuracy by margin, and accuracy by which completion is longer.

    Args:
        report: to draw.
        path: of the PNG file.
        title: of the picture.

    Returns:
        Whether it was drawn: not without matplotlib, which a message says.
    """
    if find_spec("matplotlib") is None:
        say(f"no {path.name}: matplotlib is not installed (`pip install 'rlhf-cli[plots]'`)")
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(13, 4.2), layout="constrained")
    reliability, margins, lengths = picture.subplots(1, 3)
    _reliability(reliability, report)
    _margins(margins, report)
    _lengths(lengths, report)
    heading = f"{title}: {report.accuracy.count:,} pairs of {report.accuracy.prompts:,} held-out prompts"
    picture.suptitle(heading, x=0.01, ha="left", fontsize=12, fontweight="bold", parse_math=False)
    FigureCanvasAgg(picture)
    picture.savefig(path, dpi=110, metadata={"Software": None})
    return True


def _reliability(axes: Axes, report: RankingReport) -> None:
    error = report.calibration
    _style(axes, "reliability", "confidence: sigmoid of the reward difference")
    axes.plot([0.5, 1.0], [0.5, 1.0], color=_GRAY, linewidth=1.0, linestyle="--", label="calibrated")
    _points(axes, [one.mean for one in report.reliability], report.reliability, _BLUE)
    axes.set_xlim(0.49, 1.01)
    text = f"calibration error {error.error.value:.3f}\n(about {error.if_calibrated:.3f} if calibrated)"
    axes.text(0.97, 0.05, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=8)
    axes.legend(loc="upper left", fontsize=8, frameon=False)


def _margins(axes: Axes, report: RankingReport) -> None:
    labeled = report.by_label_margin
    bins, unit = (labeled, "margin by the annotator") if labeled else (report.by_distance, "tiers between the two")
    if len(bins) < 2:
        bins, unit = report.by_predicted_margin, "difference of the two rewards"
    _style(axes, "accuracy by margin", unit)
    axes.axhline(0.5, color=_GRAY, linewidth=1.0, linestyle="--", label="chance")
    _points(axes, [one.mean for one in bins], bins, _BLUE)
    if unit == "tiers between the two":
        axes.set_xticks([one.mean for one in bins])
    axes.legend(loc="lower right", fontsize=8, frameon=False)


def _lengths(axes: Axes, report: RankingReport) -> None:
    _style(axes, "length", "")
    rows: list[tuple[str, Measured | None, str]] = [
        ("all pairs", report.accuracy, _BLUE),
        ("longer\nchosen", report.longer_chosen, _BLUE),
        ("shorter\nchosen", report.shorter_chosen, _BLUE),
        ("always the\nlonger", report.always_longer, _ORANGE),
    ]
    known = [(name, measured, color) for name, measured, color in rows if measured is not None]
    axes.axhline(0.5, color=_GRAY, linewidth=1.0, linestyle="--")
    for number, (_, measured, color) in enumerate(known):
        _whisker(axes, float(number), measured, color)
    axes.set_xticks(range(len(known)), [name for name, _, _ in known], fontsize=8)
    axes.set_xlim(-0.5, len(known) - 0.5)


def _points(axes: Axes, centers: Sequence[float], bins: Sequence[Bin], color: str) -> None:
    for center, one in zip(centers, bins, strict=True):
        _whisker(axes, center, one.accuracy, color)
    axes.plot(centers, [one.accuracy.value for one in bins], color=color, linewidth=1.2)


def _whisker(axes: Axes, center: float, measured: Measured, color: str) -> None:
    axes.plot([center, center], [measured.low, measured.high], color=color, linewidth=1.0, alpha=0.7)
    axes.plot([center], [measured.value], color=color, marker="o", markersize=5, linestyle="none")


def _style(axes: Axes, title: str, unit: str) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(unit, fontsize=9)
    axes.set_ylabel("accuracy", fontsize=9)
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
