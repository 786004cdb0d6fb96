"""Labeling by language models: calibrates the judges, asks them, and reports how reliable they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.data.records import Candidates, Ranking, prompt_text
from rlhf_cli.data.skips import Skip, SkipLog
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DataError, UsageError
from rlhf_cli.progress import say, warn
from rlhf_cli.stages.common import EXCERPT, model_source
from rlhf_cli.stages.inputs import source_of
from rlhf_cli.stages.label.stage import LabelContext

if TYPE_CHECKING:
    from rlhf_cli.labeling.judges.budget import Budget
    from rlhf_cli.labeling.judges.cache import ReplyCache
    from rlhf_cli.labeling.judges.calibration import Calibration
    from rlhf_cli.labeling.judges.local import LocalJudge
    from rlhf_cli.labeling.judges.panel import Ballot, Judge, PanelRunner
    from rlhf_cli.labeling.judges.verdicts import Verdicts
    from rlhf_cli.stages.label.settings import JudgeModelSettings, JudgeSettings

CALIBRATION = "calibration.json"
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
    from rlhf_cli.labeling.judges.budget import Budget
    from rlhf_cli.labeling.judges.cache import ReplyCache
    from rlhf_cli.labeling.judges.panel import PanelRunner

    label = context.settings
    assert label.judge is not None
    settings = label.judge
    cache = ReplyCache(context.kept, processes.index)
    budget = Budget(settings.max_cost, cache.spent, cache.unheard)
    runner = PanelRunner(cache, budget, processes, context.stop, _rubric(context, settings), settings.both_orders)
    judges = _panel(context, settings, budget, processes)
    calibration = _calibrate(context, settings, judges, runner)
    ballots = [runner.ballot(judge, candidates, "judging") for judge in judges]
    if not processes.is_main:
        return Judged()
    return _outcome(context, candidates, ballots, calibration, cache)


def _rubric(context: LabelContext, settings: JudgeSettings) -> str:
    file = source_of(context.inputs.rubric)
    return settings.rubric if file is None else Path(file).read_text(encoding="utf-8-sig")


def _panel(context: LabelContext, settings: JudgeSettings, budget: Budget, processes: ProcessGroup) -> list[Judge]:
    """Create the judges of the recipe, with unique names; weights are not loaded yet."""
    judges: list[Judge] = []
    alone = sum(one.model is not None for one in settings.panel) == 1
    for number, one in enumerate(settings.panel):
        if one.model:
            judge = _local(context, number, processes, alone=alone)
        else:
            judge = _remote(context, settings, number, one, budget)
        for other, earlier in enumerate(judges):
            if earlier.identity == judge.identity:
                raise UsageError(
                    f"`label.judge.panel.{other}` and `label.judge.panel.{number}` are the same judge, so its vote "
                    "would count twice",
                    hint="remove one of them",
                )
        judges.append(judge)
    given = Counter(judge.name for judge in judges)
    return [
        replace(judge, name=f"{judge.name} ({number})") if given[judge.name] > 1 else judge
        for number, judge in enumerate(judges)
    ]


def _local(context: LabelContext, number: int, processes: ProcessGroup, *, alone: bool) -> Judge:
    """A local judge. If it is the only one it stays loaded; otherwise one model is in memory at a time."""
    from rlhf_cli.files import hash_folder
    from rlhf_cli.labeling.judges.local import pin_to_commit
    from rlhf_cli.labeling.judges.panel import Judge

    path = context.inputs.judges[number].source
    source = model_source(context.recipe, path)
    folder = Path(path)
    if folder.is_dir():
        content = hash_folder(folder)
    else:
        source = pin_to_commit(source, processes)
        content = f"hub:{path}@{source.revision or 'main'}"
    held: list[LocalJudge] = []

    def load() -> LocalJudge:
        from rlhf_cli.labeling.judges.local import LocalJudge

        if held:
            return held[0]
        judge = LocalJudge(source)
        if alone:
            held.append(judge)
        return judge

    return Judge(
        name=folder.resolve().name if folder.is_dir() else path,
        identity=f"model {content} {source.dtype} {source.precision}",
        reply="letter",
        local=load,
    )


def _remote(
    context: LabelContext, settings: JudgeSettings, number: int, one: JudgeModelSettings, budget: Budget
) -> Judge:
    from urllib.parse import urlsplit

    from rlhf_cli.labeling.judges.budget import Prices
    from rlhf_cli.labeling.judges.endpoint import EndpointJudge
    from rlhf_cli.labeling.judges.panel import Judge

    url, name = context.inputs.judges[number].source, one.name
    assert name is not None
    return Judge(
        name=f"{name}@{urlsplit(url).netloc}",
        identity=f"endpoint {url.rstrip('/')} {name} {one.max_new_tokens}",
        reply="list" if settings.method == "listwise" else "mark",
        endpoint=EndpointJudge(
            url,
            name,
            budget=budget,
            prices=Prices(one.prompt_price, one.completion_price),
            max_new_tokens=one.max_new_tokens,
            concurrency=one.concurrency,
            token_env=one.token_env,
            timeout=one.timeout,
            retries=one.retries,
            stop=context.stop,
        ),
        priced=bool(one.prompt_price or one.completion_price),
    )


def _calibrate(
    context: LabelContext, settings: JudgeSettings, judges: Sequence[Judge], runner: PanelRunner
) -> Calibration | None:
    """Compare the panel with human rankings, if given; raises `DataError` below the floor."""
    source = source_of(context.inputs.calibration)
    if source is None:
        return None
    from rlhf_cli.labeling.judges.calibration import Calibration
    from rlhf_cli.labeling.judges.verdicts import majority

    people = _human_rankings(context, settings, source)
    ballots = [runner.ballot(judge, people, "calibrating") for judge in judges]
    if not runner.processes.is_main:
        return None
    verdicts: list[Verdicts] = [majority(each) for each in zip(*(ballot.verdicts for ballot in ballots), strict=True)]
    found = Calibration.of(source, people, ballots, verdicts)
    say(f"label: the judges agree with the human rankings on {found.panel.rate} untied pairs of {source}")
    report = json.dumps(found.to_json() | {"floor": settings.floor}, indent=2, ensure_ascii=False)
    (context.kept / CALIBRATION).write_text(report + "\n", encoding="utf-8")
    found.check(settings.floor)
    return found


def _human_rankings(context: LabelContext, settings: JudgeSettings, source: str) -> list[Candidates]:
    """Human rankings. Several rankings of the same completions are several measurements, but one question."""
    from rlhf_cli.data.sources import iter_records
    from rlhf_cli.labeling.judges.questions import LETTERS, is_too_many

    data, skips = context.recipe.data, SkipLog(keep=1)
    too_many = f"more than {len(LETTERS)} completions, which `method: listwise` cannot show"
    records: list[Candidates] = []
    for record in iter_records(source, "candidates", columns=data.columns, on_skip=skips.add, keep_blank=True):
        if not isinstance(record, Candidates):
            continue
        if settings.method == "listwise" and is_too_many(record.completions):
            skips.add(Skip(record.location or source, too_many, prompt_text(record.prompt)[:EXCERPT]))
        else:
            records.append(record)
    skips.check(len(records) + skips.total, data.max_skip, source)
    for line in skips.warnings(len(records) + skips.total, source):
        warn(line)
    return records


def _outcome(
    context: LabelContext,
    candidates: Sequence[Candidates],
    ballots: Sequence[Ballot],
    calibration: Calibration | None,
    cache: ReplyCache,
) -> Judged:
    """Turn votes into rankings, and write the reports."""
    from rlhf_cli.labeling.judges import report as reporting
    from rlhf_cli.labeling.judges.verdicts import majority
    from rlhf_cli.labeling.label_records import write_labels
    from rlhf_cli.labeling.warnings import in_one_line

    verdicts = [majority(each) for each in zip(*(ballot.verdicts for ballot in ballots), strict=True)]
    report = reporting.PanelReport.of(candidates, ballots, verdicts, calibration)
    reporting.write_votes(context.output / reporting.VOTES, candidates, ballots)
    write_labels(context.output / reporting.LABELS, reporting.labels(candidates, ballots))
    annotator = ballots[0].judge.name if len(ballots) == 1 else f"panel of {len(ballots)} judges"
    rankings, skips = _rankings(candidates, verdicts, annotator)
    for warning in report.warnings():
        warn(in_one_line(warning))
    plain = report.to_json() | {
        "rankings": len(candidates) - skips.total,
        "skipped": skips.counts,
        "spent_in_this_run_directory": round(cache.spent, 6),
        "attempts_without_reply": {"count": cache.attempts_unheard, "cost": round(cache.unheard, 6)},
    }
    text = json.dumps(plain, indent=2, ensure_ascii=False)
    (context.output / reporting.REPORT).write_text(text + "\n", encoding="utf-8")
    if skips.total == len(candidates):
        names = ", ".join(ballot.judge.name for ballot in ballots)
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skips.counts.items())
        raise DataError(
            f"the judges ({names}) ranked none of {len(candidates):,} prompts: {reasons}",
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
