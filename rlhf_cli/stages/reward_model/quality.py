"""What is said and written about a reward model's quality: `quality.json`, metrics, summary, and plain words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_cli.data.records import Ranking
from rlhf_cli.files import write_whole
from rlhf_cli.intervals import ENOUGH_PROMPTS, percent
from rlhf_cli.rewards.estimates import Measured, measured_share
from rlhf_cli.stages.reward_model.calibration import is_right
from rlhf_cli.stages.reward_model.evaluation import RankingReport, preferred_pairs
from rlhf_cli.stages.reward_model.quality_plot import draw_quality

QUALITY = "quality.json"
PICTURE = "quality.png"

Verdict = Literal["better than chance", "no better than chance", "below chance", "too few prompts"]


def verdict(report: RankingReport) -> Verdict:
    """Say by the interval of the accuracy whether preferences were learned."""
    if report.accuracy.low > 0.5:
        return "better than chance"
    if report.accuracy.high < 0.5:
        return "below chance"
    return "too few prompts" if report.accuracy.prompts < ENOUGH_PROMPTS else "no better than chance"


def doubts(report: RankingReport) -> str | None:
    """Return a sentence about an accuracy that shows no preference learned; None if it is above chance."""
    accuracy, found = report.accuracy, verdict(report)
    if found == "better than chance":
        return None
    if found == "below chance":
        return (
            f"the held-out accuracy of {accuracy} is below chance: the rewards contradict the held-out rankings; check "
            "that the best completion stands first (or is `chosen`) in all of the data"
        )
    if found == "too few prompts":
        return (
            f"{accuracy.prompts:,} held-out {'prompt is' if accuracy.prompts == 1 else 'prompts are'} too few to say "
            f"whether an accuracy of {percent(accuracy.value)} is better than chance; about {ENOUGH_PROMPTS} give an "
            "interval of +-10 points: label more, or raise `data.holdout`"
        )
    return f"the held-out accuracy of {accuracy} is no better than chance"


def write_quality(report: RankingReport, folder: Path, more: Mapping[str, Any] | None = None) -> None:
    """Write `quality.json` and, with matplotlib, `quality.png` to the folder of a reward model.

    Args:
        report: of the held-out pairs.
        folder: of the reward model.
        more: further content, see `members_json`.
    """
    content: dict[str, Any] = {"verdict": verdict(report), "warning": doubts(report)} | report.to_json()
    content |= more or {}
    write_whole(folder / QUALITY, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    draw_quality(report, folder / PICTURE, title="reward model")


def members_json(rankings: Sequence[Ranking], members: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Return what `quality.json` says of an ensemble: the accuracy of each member, and how often they disagree.

    Args:
        rankings: held-out rankings.
        members: per member and ranking, the raw rewards of its completions.
    """
    pairs = [preferred_pairs(rankings, rewards)[0] for rewards in members]
    accuracies = [measured_share((pair.prompt, is_right(pair.difference), 1.0) for pair in own) for own in pairs]
    differ = measured_share(
        (same[0].prompt, float(len({pair.difference > 0 for pair in same}) > 1), 1.0)
        for same in zip(*pairs, strict=True)
    )
    assert differ is not None
    return {
        "members": [{"accuracy": one.to_json()} for one in accuracies if one is not None],
        "disagreement": differ.to_json(),
    }


def curve_json(accuracies: Mapping[float, Measured], rankings: Mapping[float, int]) -> list[dict[str, Any]]:
    """Return what `quality.json` says of the data-size curve, smallest first.

    Args:
        accuracies: share of the training prompts -> held-out accuracy.
        rankings: share -> number of rankings that were trained on.
    """
    return [
        {"share": share, "rankings": rankings[share], "accuracy": accuracies[share].to_json()}
        for share in sorted(accuracies)
    ]


def quality_metrics(report: RankingReport, train_accuracy: float, mean: float, std: float) -> dict[str, float]:
    """Return the metrics of the stage: each one with the ends of its interval, `_low` and `_high`.

    Args:
        report: of the held-out pairs.
        train_accuracy: on some training prompts.
        mean: raw reward that is normalized to 0.
        std: raw difference that is normalized to 1.
    """
    metrics: dict[str, float] = {}
    for name, one in report.measured().items():
        metrics |= {
            f"rm/{name}": one.value,
            f"rm/{name}_low": one.low,
            f"rm/{name}_high": one.high,
        }
    metrics |= {
        "rm/always_shorter": 1.0 - report.always_longer.value,
        "rm/train_accuracy": train_accuracy,
        "rm/mean_best": (report.mean_best - mean) / std,
        "rm/mean_worst": (report.mean_worst - mean) / std,
        "rm/lowest": (report.lowest - mean) / std,
        "rm/highest": (report.highest - mean) / std,
        "rm/prompts": float(report.accuracy.prompts),
        "rm/pairs": float(report.accuracy.count),
        "rm/ties": float(report.ties),
        "rm/mean": mean,
        "rm/std": std,
    }
    return metrics | {f"rm/accuracy_distance_{one.low:.0f}": one.accuracy.value for one in report.by_distance}


def quality_summary(report: RankingReport, train_accuracy: float) -> list[tuple[str, str]]:
    """Return the rows of the summary table."""
    accuracy, longer = report.accuracy, report.always_longer.value
    rows = [
        ("held-out accuracy", f"{accuracy}, {accuracy.count:,} pairs of {accuracy.prompts:,} prompts"),
        ("always the longer completion", f"{percent(longer)}; the shorter {percent(1 - longer)}"),
    ]
    if report.longer_chosen is not None and report.shorter_chosen is not None:
        text = f"{report.longer_chosen}, {report.shorter_chosen}"
        rows.append(("accuracy where the longer, the shorter is better", text))
    rows += [
        (
            "calibration error",
            f"{report.calibration.error.value:.3f}; about {report.calibration.if_calibrated:.3f} if calibrated",
        ),
        ("accuracy in training", percent(train_accuracy)),
    ]
    if verdict(report) != "better than chance":
        rows.insert(1, ("verdict", verdict(report)))
    return rows
