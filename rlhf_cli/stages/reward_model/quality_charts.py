"""Charts of a reward model's quality on held-out pairs, from what `quality.json` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_cli.charts.chart import Chart, Interval, Mark, Series

_ACCURACY = "accuracy, share of pairs"
_CHANCE = Mark(0.5, "chance")
_SUBJECT = "reward model"
_LENGTHS = (
    ("accuracy", "all pairs", 0),
    ("accuracy_longer_chosen", "longer chosen", 0),
    ("accuracy_shorter_chosen", "shorter chosen", 0),
    ("always_longer", "always the longer", 1),
)
"""(metric, name, color)."""

Bin = Mapping[str, Any]


def quality_charts(plain: Mapping[str, Any]) -> list[Chart]:
    """Return the reliability of confidences, accuracy by margin, and accuracy by which completion is longer.

    Args:
        plain: content of `quality.json`.
    """
    found = [_reliability(plain), _margins(plain), _lengths(plain)]
    return [chart for chart in found if chart.drawn]


def _reliability(plain: Mapping[str, Any]) -> Chart:
    error = plain.get("metrics", {}).get("calibration_error")
    caption = (
        "On the dashed line, the model is right on 80% of the pairs of which it is 80% sure; below, overconfident."
    )
    if error is not None:
        expected = plain["calibration_error_if_calibrated"]
        caption += f" Calibration error: {error['value']:.3f} (about {expected:.3f} if calibrated)."
    return Chart(
        "Is its confidence justified?",
        caption,
        [_accuracies(plain.get("reliability", ()))],
        x="confidence: sigmoid of the difference of two rewards",
        y=_ACCURACY,
        subject=_SUBJECT,
        shows=(0.5, 1.0),
        diagonal=True,
    )


def _margins(plain: Mapping[str, Any]) -> Chart:
    """Return accuracy by the annotator's margin, else by tiers, else by the difference of the rewards."""
    bins, unit = plain.get("by_label_margin", ()), "margin by the annotator"
    if not bins:
        bins, unit = plain.get("by_distance", ()), "tiers between the two"
    is_tiers = unit == "tiers between the two" and len(bins) > 1
    if len(bins) < 2:
        bins, unit = plain.get("by_predicted_margin", ()), "difference of the two rewards"
    return Chart(
        "Are clear differences easier?",
        "Accuracy by how different the two completions are.",
        [_accuracies(bins)],
        x=unit,
        y=_ACCURACY,
        subject=_SUBJECT,
        marks=(_CHANCE,),
        shows=(0.5, 1.0),
        has_whole_x=is_tiers,
    )


def _lengths(plain: Mapping[str, Any]) -> Chart:
    metrics = plain.get("metrics", {})
    known = [(metrics[metric], name, color) for metric, name, color in _LENGTHS if metric in metrics]
    series = [
        Series("", [(float(number), one["value"])], color, "dots", [_interval(float(number), one)])
        for number, (one, _, color) in enumerate(known)
    ]
    return Chart(
        "Does it learn more than length?",
        "Accuracy where the longer and where the shorter completion was preferred. Orange: always the longer one.",
        series,
        x="pairs",
        y=_ACCURACY,
        subject=_SUBJECT,
        marks=(_CHANCE,),
        shows=(0.5, 1.0),
        x_names=[name for _, name, _ in known],
    )


def _accuracies(bins: Sequence[Bin]) -> Series:
    known = [one for one in bins if one.get("accuracy", {}).get("value") is not None]
    points = [(one["mean"], one["accuracy"]["value"]) for one in known]
    return Series("", points, 0, "both", [_interval(one["mean"], one["accuracy"]) for one in known])


def _interval(x: float, measured: Mapping[str, Any]) -> Interval:
    return x, measured["low"], measured["high"]
