"""Labeling by annotators: prepares a session, waits for labels, and aggregates them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.data.records import Candidates, Ranking
from rlhf_cli.distributed.worker import hand_over, is_handed_over
from rlhf_cli.durations import format_duration
from rlhf_cli.errors import WaitingForLabelsError
from rlhf_cli.labeling.aggregation import aggregate, check_installed
from rlhf_cli.labeling.label_records import write_labels
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import SessionProgress
from rlhf_cli.labeling.statistics.summary import statistics
from rlhf_cli.labeling.warnings import write_warnings
from rlhf_cli.progress import warn
from rlhf_cli.quoting import word
from rlhf_cli.stages.inputs import source_of
from rlhf_cli.stages.label.sampling import check_count, distinct
from rlhf_cli.stages.label.settings import LabelSettings
from rlhf_cli.stages.label.stage import LabelContext
from rlhf_cli.training.monitoring.timing_log import PEOPLE

STORE = "labels.sqlite"


@dataclass(frozen=True)
class HumanLabels:
    """Result of labeling by annotators.

    Attributes:
        rankings: aggregated by `human.aggregation`.
        metrics: numbers for the manifest.
        summary: rows for the console.
        timing: active time of the annotators.
    """

    rankings: list[Ranking]
    metrics: dict[str, float]
    summary: list[tuple[str, str]]
    timing: dict[str, float]


def run_human(context: LabelContext, candidates: Sequence[Candidates]) -> HumanLabels:
    """Return the labels of these completions once there are enough; writes `labels.jsonl`.

    Raises:
        WaitingForLabelsError: labels are missing; the session is prepared, and annotators can begin.
    """
    settings = context.settings.human
    assert settings is not None
    check_installed(settings.aggregation)
    session = LabelSession(context.kept / STORE)
    try:
        session.prepare(
            label_plan(context.settings, context.recipe.seed, source_of(context.inputs.guidelines)),
            candidates,
            gold_items(context),
        )
        progress = session.progress()
        if not progress.is_complete or is_handed_over():
            hand_over(store=str(context.kept / STORE))
            raise waiting(progress, context.kept / STORE, context.output.parent)
        labels, overview = session.labels(), session.overview()
    finally:
        session.close()
    write_labels(context.output / "labels.jsonl", labels)
    warnings = statistics(labels, seed=context.recipe.seed).warnings
    write_warnings(context.output, warnings)
    if warnings:
        one = len(warnings) == 1
        warn(
            f"{len(warnings):,} {'problem was' if one else 'problems were'} found in these labels; before training, "
            f"run `rlhf label stats {word(context.output.parent)}`"
        )
    annotators = sum(row.labels > 0 for row in overview)
    seconds = sum(row.active_seconds for row in overview)
    metrics = {
        "labels": float(progress.labels),
        "annotators": float(annotators),
        "set_aside": float(progress.set_aside),
        "active_hours": seconds / 3600,
    }
    summary = [
        ("labels", f"{progress.labels:,} by {_annotators(annotators)}, {format_duration(seconds)} of active time"),
    ]
    if progress.set_aside:
        summary.append(("set aside", f"{progress.set_aside:,} prompts, skipped or flagged"))
    return HumanLabels(aggregate(labels, settings.aggregation), metrics, summary, {PEOPLE: seconds})


def label_plan(label: LabelSettings, seed: int, guidelines: str | None) -> LabelPlan:
    """The plan of the labeling session, from the recipe.

    Args:
        label: the section.
        seed: of the run.
        guidelines: path of the guidelines file.
    """
    settings = label.human
    assert settings is not None
    return LabelPlan(
        overlap=settings.overlap,
        criteria=tuple(settings.criteria),
        strengths=settings.strengths,
        repeat_share=settings.repeat_share,
        gold_share=settings.gold_share if settings.gold is not None else 0.0,
        set_aside_after=settings.set_aside_after,
        enough=settings.enough,
        seed=seed,
        guidelines=None if guidelines is None else Path(guidelines).read_text(encoding="utf-8-sig"),
    )


def gold_items(context: LabelContext) -> list[Candidates]:
    """Read the completions of `label.human.gold`, whose right order is known."""
    source = source_of(context.inputs.gold)
    if source is None:
        return []
    from rlhf_cli.data.sources import read_records

    data = context.recipe.data
    loaded = read_records(source, "ranking", columns=data.columns, comparison=data.comparison, max_skip=data.max_skip)
    known = [
        distinct(Candidates(row.prompt, row.completions, row.tiers, location=row.location)) for row in loaded.records
    ]
    for row in known:
        check_count(row)
    return [row for row in known if len(row.completions) > 1]


def waiting(progress: SessionProgress, store: Path, run_dir: Path) -> WaitingForLabelsError:
    """The error that says how many labels are missing."""
    if progress.growth is not None:
        return WaitingForLabelsError(
            f"the pipeline waits for labels: {progress.done - progress.set_aside:,} of {progress.items:,} prompts are "
            f"labeled, {progress.growth}",
            store=str(store),
            hint="repeat the command that started this run: it samples the other completions, and labeling goes on",
        )
    aside = f", {progress.set_aside:,} set aside" if progress.set_aside else ""
    share = math.floor(100 * progress.done / progress.items) / 100  # rounded down: it is reached
    fewer = (
        f"; to continue with the labels given so far, add `--set label.human.enough={share:g}` to that command"
        if share
        else ""
    )
    return WaitingForLabelsError(
        f"the pipeline waits for labels: {progress.done - progress.set_aside:,} of {progress.items:,} prompts are "
        f"labeled{aside}, {progress.labels_left:,} {'label is' if progress.labels_left == 1 else 'labels are'} "
        "missing",
        store=str(store),
        hint=f"label with `rlhf label --run-dir {word(run_dir)}`, or add `--serve` to label in a browser; then repeat "
        f"the command that started this run{fewer}",
    )


def _annotators(count: int) -> str:
    return f"{count} annotator" if count == 1 else f"{count} annotators"
