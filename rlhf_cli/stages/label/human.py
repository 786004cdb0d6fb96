"""Labeling by people, as the pipeline sees it: prepare a session, wait for people, take what they said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.data.records import Candidates, Ranking
from rlhf_cli.errors import WaitingForLabelsError
from rlhf_cli.labeling.aggregation import merge, require
from rlhf_cli.labeling.label_records import write_labels
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.session.types import LabelPlan, Progress
from rlhf_cli.labeling.statistics.summary import statistics
from rlhf_cli.progress import warn
from rlhf_cli.stages.inputs import source_of
from rlhf_cli.stages.label.sampling import check_count, distinct
from rlhf_cli.stages.label.settings import HumanSettings, LabelSettings
from rlhf_cli.stages.label.stage import LabelContext

STORE = "labels.sqlite"


@dataclass(frozen=True)
class HumanLabels:
    """What people said.

    Attributes:
        rankings: as `human.merge` asks.
        metrics: figures for the manifest.
        summary: rows for people.
    """

    rankings: list[Ranking]
    metrics: dict[str, float]
    summary: list[tuple[str, str]]


def run_people(context: LabelContext, candidates: Sequence[Candidates]) -> HumanLabels:
    """Take people's labels of these answers, once there are enough; writes `labels.jsonl`.

    Raises:
        WaitingForLabelsError: there are not; the session is prepared, and the faces can be opened on it.
    """
    label = context.settings
    settings = label.human or HumanSettings()
    require(settings.merge)
    session = LabelSession(context.kept / STORE)
    try:
        session.prepare(
            label_plan(context.settings, context.recipe.seed, source_of(context.inputs.guidelines)),
            candidates,
            _gold(context),
        )
        progress = session.progress()
        if not progress.is_complete:
            raise waiting(progress, context.kept / STORE, context.output.parent)
        labels, overview = session.labels(), session.overview()
    finally:
        session.close()
    write_labels(context.output / "labels.jsonl", labels)
    warnings = statistics(labels, seed=context.recipe.seed).warnings
    if warnings:
        warn(
            f"{len(warnings):,} {'thing' if len(warnings) == 1 else 'things'} about these labels to look into before "
            f"training on them: `rlhf label stats {context.output.parent}`"
        )
    people = sum(row.labels > 0 for row in overview)
    hours = sum(row.active_seconds for row in overview) / 3600
    metrics = {
        "labels": float(progress.labels),
        "annotators": float(people),
        "set_aside": float(progress.set_aside),
        "active_hours": hours,
    }
    summary = [
        ("labels", f"{progress.labels:,} by {people} {'person' if people == 1 else 'people'}, {hours:.1f} hours"),
    ]
    if progress.set_aside:
        summary.append(("set aside", f"{progress.set_aside:,} prompts, skipped or flagged"))
    return HumanLabels(merge(labels, settings.merge), metrics, summary)


def label_plan(label: LabelSettings, seed: int, guidelines: str | None) -> LabelPlan:
    """How people label, by the recipe.

    Args:
        label: the section.
        seed: of the run.
        guidelines: file with them.
    """
    settings = label.human or HumanSettings()
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


def _gold(context: LabelContext) -> list[Candidates]:
    source = source_of(context.inputs.gold)
    if source is None:
        return []
    from rlhf_cli.data.sources import read_records

    data = context.recipe.data
    loaded = read_records(source, "ranking", columns=data.columns, max_skip=data.max_skip)
    known = [
        distinct(Candidates(row.prompt, row.completions, row.tiers, location=row.location)) for row in loaded.records
    ]
    for row in known:
        check_count(row)
    return [row for row in known if len(row.completions) > 1]


def waiting(progress: Progress, store: Path, run_dir: Path) -> WaitingForLabelsError:
    """What is said while labels lack."""
    aside = f", {progress.set_aside:,} set aside" if progress.set_aside else ""
    return WaitingForLabelsError(
        f"the pipeline waits for people: {progress.done - progress.set_aside:,} of {progress.items:,} prompts are "
        f"labeled{aside}, "
        f"{progress.labels_left:,} {'label is' if progress.labels_left == 1 else 'labels are'} still needed",
        store=str(store),
        hint=f"label with `rlhf label --run-dir {run_dir}` at the keyboard, or with `--serve` in a browser; then run "
        "the same command again",
    )
