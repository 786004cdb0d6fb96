"""What is drawn of a stage's metrics, in the report, in `rlhf watch` and in `curves.png`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rlhf_cli.training.monitoring.curves import Curve

_Point = TypeVar("_Point")


@dataclass(frozen=True)
class Panel:
    """One figure over the steps of a stage.

    Attributes:
        title: of the figure.
        unit: of the vertical axis.
        metric: in `metrics.jsonl`.
        evaluated: metric of held-out data in the same figure.
        mark: a height that is drawn, with its label.
        shows: values that the axis includes, so that noise does not fill it.
        spread: name of the metric's standard deviation within a step.
    """

    title: str
    unit: str
    metric: str
    evaluated: str | None = None
    mark: tuple[float, str] | None = None
    shows: tuple[float, ...] = ()
    spread: str | None = None


PANELS: Mapping[str, tuple[Panel, ...]] = {
    "ppo": (
        Panel(
            "Reward", "mean of completions", "objective/scores", "eval/objective/scores", spread="objective/scores_std"
        ),
        Panel("KL", "nats per completion", "objective/kl", "eval/objective/kl", shows=(0.0, 1.0)),
        Panel("Length", "tokens", "length/mean", "eval/length/mean", shows=(0.0, 1.0)),
        Panel("Entropy", "nats per token", "policy/entropy_avg", shows=(0.0, 0.1)),
        Panel("Clipped", "share of tokens", "policy/clipfrac_avg", mark=(0.2, "steps too large"), shows=(0.0, 0.05)),
        Panel(
            "Critic", "explained variance", "val/explained_variance", mark=(0.0, "as good as a constant"), shows=(0.0,)
        ),
    ),
    "train-rm": (
        Panel("Loss", "nats per pair", "loss", "eval/loss", mark=(math.log(2), "chance")),
        Panel("Accuracy", "share of pairs", "accuracy", "eval/accuracy", mark=(0.5, "chance"), shows=(0.5,)),
    ),
    "sft": (Panel("Loss", "nats per token", "loss", "eval/loss"),),
}


@dataclass(frozen=True)
class Trace:
    """A metric over the steps of a stage.

    Attributes:
        raw: (step, value) of each step.
        smooth: the same as a running mean, over a fifteenth of the steps.
        held_out: (step, value) of held-out data.
        caption: where it began and where it is, as means over a tenth of the steps.
    """

    raw: Sequence[tuple[float, float]]
    smooth: Sequence[tuple[float, float]]
    held_out: Sequence[tuple[float, float]]
    caption: str


def trace(rows: Sequence[Mapping[str, Any]], panel: Panel) -> Trace | None:
    """Return what a panel shows of rows of a `metrics.jsonl`; None if they do not have its metric."""
    curve = Curve.of([row for row in rows if row["step"] > 0], panel.metric)
    if not len(curve):
        return None
    smooth = zip(curve.steps, curve.running_mean(max(1, len(curve) // 15)), strict=True)
    held_out = [] if panel.evaluated is None else list(Curve.of(rows, panel.evaluated))
    least = 3 if len(curve) > 8 else 1  # steps at either end, which must not be the same ones
    first, last = curve.first(0.1, least=least), curve.last(0.1, least=least)
    return Trace(list(curve), list(smooth), held_out, f"{_value(first.mean)} → {_value(last.mean)}")


def _value(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def thinned(points: Sequence[_Point], most: int) -> list[_Point]:
    """Return at most about `most` points of a curve, evenly spread, the last one among them."""
    step = max(1, -(-len(points) // most))
    return [*points[::step], *(points[-1:] if (len(points) - 1) % step else ())]
