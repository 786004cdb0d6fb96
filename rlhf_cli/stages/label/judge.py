"""Labeling by language models: calibrates the judges, asks them, and reports how reliable they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlhf_cli.data.records import Candidates, Ranking, prompt_text
from rlhf_cli.data.skips import Skip, SkipLog
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DataError
from rlhf_cli.stages.common import EXCERPT
from rlhf_cli.stages.label.stage import LabelContext
from rlhf_cli.stages.panel import AskedPanel, ask_panel

if TYPE_CHECKING:
    from rlhf_cli.labeling.judges.verdicts import Verdicts

_NO_VERDICT = "no verdict by any judge"
_TOO_FEW = "verdicts on less than half of its pairs"


@dataclass(frozen=True)
class Judged:
    """Result of labeling by judges.

    Attributes:
        rankings: per candidate; None where there are too few verdicts.
        skipped: reason -> number of candidates without a ranking.
        metrics: numbers for the manifest.
        summary: rows for the console.
    """

    rankings: list[Ranking | None] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    summary: list[tuple[str, str]] = field(default_factory=list)


def run_judges(context: LabelContext, candidates: Sequence[Candidates], processes: ProcessGroup) -> Judged:
    """Rank completions with the panel of `label.judge`; writes `votes.jsonl`, `labels.jsonl` and `judge.json`.

    Every process of the run calls this; all except rank 0 get an empty result.

    Raises:
        DataError: the agreement with human rankings is below `floor`, an endpoint is unusable, or too many prompts have
            no ranking.
        CostLimitError: the next verdict could exceed `max_cost`.
        Interrupted: a signal arrived. In all cases earlier verdicts are kept, and the same command resumes.
    """
    settings = context.settings.judge
    assert settings is not None
    asked = ask_panel(context, settings, candidates, processes)
    if not processes.is_main:
        return Judged()
    return _outcome(context, candidates, asked)


def _outcome(context: LabelContext, candidates: Sequence[Candidates], asked: AskedPanel) -> Judged:
    """Turn votes into rankings, and write the reports."""
    from rlhf_cli.labeling.judges import report as reporting
    from rlhf_cli.labeling.label_records import write_labels

    names = [ballot.judge.name for ballot in asked.ballots]
    write_labels(context.output / reporting.LABELS, reporting.labels(candidates, asked.ballots))
    annotator = names[0] if len(names) == 1 else f"panel of {len(names)} judges"
    rankings, skips = _rankings(candidates, asked.verdicts, annotator)
    counts = {"rankings": len(candidates) - skips.total, "skipped": skips.counts}
    report = asked.write_report(context, candidates, counts)
    if skips.total == len(candidates):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skips.counts.items())
        raise DataError(
            f"the judges ({', '.join(names)}) ranked none of {len(candidates):,} prompts: {reasons}",
            hint=f"see {context.output / reporting.VOTES}; try another judge, or one with a longer context",
        )
    skips.check(len(candidates), context.recipe.data.max_skip, "label.judge")
    return Judged(rankings, skips.counts, report.metrics(), report.summary())


def _rankings(
    candidates: Sequence[Candidates], verdicts: Sequence[Verdicts], annotator: str
) -> tuple[list[Ranking | None], SkipLog]:
    from rlhf_cli.labeling.judges.report import is_enough
    from rlhf_cli.labeling.judges.verdicts import tiers_of

    skips, rankings = SkipLog(keep=1), []
    for row, found in zip(candidates, verdicts, strict=True):
        count = len(row.completions)
        if is_enough(found, count):
            rankings.append(Ranking(row.prompt, row.completions, tiers_of(found, count), annotator=annotator))
            continue
        rankings.append(None)
        excerpt = prompt_text(row.prompt)[:EXCERPT]
        skips.add(Skip(row.location or "an item", _TOO_FEW if found else _NO_VERDICT, excerpt))
    return rankings, skips
