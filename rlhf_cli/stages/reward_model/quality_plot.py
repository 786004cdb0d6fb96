"""A picture of a reward model's quality on held-out pairs, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.plotting import BLUE, GRAY, ORANGE, has_matplotlib, new_picture, prepare, save
from rlhf_cli.progress import say
from rlhf_cli.rewards.estimates import Measured
from rlhf_cli.stages.reward_model.evaluation import Bin, RankingReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_quality(report: RankingReport, path: Path, *, title: str) -> bool:
    """Draw the reliability of confidences, accuracy by margin, and accuracy by which completion is longer.

    Args:
        report: to draw.
        path: of the PNG file.
        title: of the picture.

    Returns:
        Whether it was drawn: not without matplotlib, which a message says.
    """
    if not has_matplotlib():
        say(f"no {path.name}: matplotlib is not installed (`pip install 'rlhf-cli[plots]'`)")
        return False
    pairs = f"{report.accuracy.count:,} pairs of {report.accuracy.prompts:,} held-out prompts"
    picture = new_picture(13, 4.2, f"{title}: {pairs}")
    reliability, margins, lengths = picture.subplots(1, 3)
    _reliability(reliability, report)
    _margins(margins, report)
    _lengths(lengths, report)
    save(picture, path)
    return True


def _reliability(axes: Axes, report: RankingReport) -> None:
    error = report.calibration
    _style(axes, "reliability", "confidence: sigmoid of the reward difference")
    axes.plot([0.5, 1.0], [0.5, 1.0], color=GRAY, linewidth=1.0, linestyle="--", label="calibrated")
    _points(axes, [one.mean for one in report.reliability], report.reliability, BLUE)
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
    axes.axhline(0.5, color=GRAY, linewidth=1.0, linestyle="--", label="chance")
    _points(axes, [one.mean for one in bins], bins, BLUE)
    if unit == "tiers between the two":
        axes.set_xticks([one.mean for one in bins])
    axes.legend(loc="lower right", fontsize=8, frameon=False)


def _lengths(axes: Axes, report: RankingReport) -> None:
    _style(axes, "length", "")
    rows: list[tuple[str, Measured | None, str]] = [
        ("all pairs", report.accuracy, BLUE),
        ("longer\nchosen", report.longer_chosen, BLUE),
        ("shorter\nchosen", report.shorter_chosen, BLUE),
        ("always the\nlonger", report.always_longer, ORANGE),
    ]
    known = [(name, measured, color) for name, measured, color in rows if measured is not None]
    axes.axhline(0.5, color=GRAY, linewidth=1.0, linestyle="--")
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

    prepare(axes, title, unit, "accuracy")
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
