"""A panel of judges in a stage: inputs, members, verdicts, and the report about them. Imports no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.data.records import Candidates, prompt_text
from rlhf_cli.data.skips import Skip, SkipLog
from rlhf_cli.errors import UsageError
from rlhf_cli.progress import say, warn
from rlhf_cli.settings.judges import JudgeModelSettings, JudgeSettings
from rlhf_cli.stages.base import StageContext
from rlhf_cli.stages.common import EXCERPT, model_source
from rlhf_cli.stages.inputs import Input, InputFinder, source_of

if TYPE_CHECKING:
    from rlhf_cli.distributed.process_group import ProcessGroup
    from rlhf_cli.labeling.judges.budget import Budget
    from rlhf_cli.labeling.judges.cache import ReplyCache
    from rlhf_cli.labeling.judges.calibration import Calibration
    from rlhf_cli.labeling.judges.local import LocalJudge
    from rlhf_cli.labeling.judges.panel import Ballot, Judge, PanelRunner
    from rlhf_cli.labeling.judges.report import PanelReport
    from rlhf_cli.labeling.judges.verdicts import Verdicts

CALIBRATION = "calibration.json"


def judge_inputs(settings: JudgeSettings | None, section: str, find: InputFinder) -> dict[str, Any]:
    """Return the inputs of the section `judge` of a stage: `judges`, `rubric` and `calibration`.

    Args:
        settings: the section; None if there are no judges.
        section: of the stage.
        find: finds the inputs of the stage.
    """
    if settings is None:
        return {"judges": (), "rubric": None, "calibration": None}
    return {
        "judges": tuple(_judge(f"{section}.judge.panel.{at}", judge) for at, judge in enumerate(settings.panel)),
        "rubric": find.named("file", settings.rubric_file, "judge.rubric_file"),
        "calibration": find.named("data", settings.calibration, "judge.calibration", records="ranking"),
    }


def _judge(name: str, judge: JudgeModelSettings) -> Input:
    if judge.model is not None:
        return Input("model", judge.model, f"{name}.model", role="judge")
    assert judge.url is not None
    return Input("endpoint", judge.url, f"{name}.url", matters=False, token_env=judge.token_env)


@dataclass(frozen=True)
class AskedPanel:
    """What a panel said.

    Attributes:
        ballots: of each judge.
        verdicts: of the majority, per candidate.
        calibration: agreement with human rankings, if there are any.
        cache: stored replies, and what they cost.
    """

    ballots: list[Ballot]
    verdicts: list[Verdicts]
    calibration: Calibration | None
    cache: ReplyCache

    def write_report(
        self, context: StageContext[Any, Any], candidates: Sequence[Candidates], counts: Mapping[str, Any]
    ) -> PanelReport:
        """Write `votes.jsonl` and `judge.json`, and show the warnings.

        Args:
            context: of the stage.
            candidates: that the panel was asked about.
            counts: of the stage's results, for the report.
        """
        from rlhf_cli.labeling.judges import report as reporting
        from rlhf_cli.labeling.warnings import in_one_line

        report = reporting.PanelReport.of(candidates, self.ballots, self.verdicts, self.calibration)
        reporting.write_votes(context.output / reporting.VOTES, candidates, self.ballots)
        for warning in report.warnings():
            warn(in_one_line(warning))
        unheard = {"count": self.cache.attempts_unheard, "cost": round(self.cache.unheard, 6)}
        spent = {"spent_in_this_run_directory": round(self.cache.spent, 6), "attempts_without_reply": unheard}
        text = json.dumps(report.to_json() | dict(counts) | spent, indent=2, ensure_ascii=False)
        (context.output / reporting.REPORT).write_text(text + "\n", encoding="utf-8")
        return report


def ask_panel(
    context: StageContext[Any, Any],
    settings: JudgeSettings,
    candidates: Sequence[Candidates],
    processes: ProcessGroup,
) -> AskedPanel:
    """Calibrate the panel, and ask it about all candidates; its replies are kept in `context.kept`.

    Every process of the run calls this; the ballots and verdicts of all except rank 0 are empty.

    Args:
        context: of the stage, whose inputs have the fields of `judge_inputs`.
        settings: of the panel.
        candidates: prompts with their completions.
        processes: of the run.

    Raises:
        DataError: the agreement with human rankings is below `floor`, or an endpoint is unusable.
        CostLimitError: the next verdict could exceed `max_cost`.
        Interrupted: a signal arrived. In all cases earlier verdicts are kept, and the same command resumes.
    """
    from rlhf_cli.labeling.judges.budget import Budget
    from rlhf_cli.labeling.judges.cache import ReplyCache
    from rlhf_cli.labeling.judges.panel import PanelRunner
    from rlhf_cli.labeling.judges.verdicts import majority

    cache = ReplyCache(context.kept, processes.index)
    budget = Budget(settings.max_cost, cache.spent, cache.unheard, section=f"{context.stage.section}.judge")
    runner = PanelRunner(cache, budget, processes, context.stop, _rubric(context, settings), settings.both_orders)
    judges = _panel(context, settings, budget, processes)
    calibration = _calibrate(context, settings, judges, runner)
    ballots = [runner.ballot(judge, candidates, "judging") for judge in judges]
    verdicts = [majority(each) for each in zip(*(ballot.verdicts for ballot in ballots), strict=True)]
    return AskedPanel(ballots, verdicts, calibration, cache)


def _rubric(context: StageContext[Any, Any], settings: JudgeSettings) -> str:
    file = source_of(context.inputs.rubric)
    return settings.rubric if file is None else Path(file).read_text(encoding="utf-8-sig")


def _panel(
    context: StageContext[Any, Any], settings: JudgeSettings, budget: Budget, processes: ProcessGroup
) -> list[Judge]:
    """Create the judges of the recipe, with unique names; weights are not loaded yet."""
    judges: list[Judge] = []
    section = f"{context.stage.section}.judge"
    alone = sum(one.model is not None for one in settings.panel) == 1
    for number, one in enumerate(settings.panel):
        if one.model:
            judge = _local(context, number, processes, alone=alone)
        else:
            judge = _remote(context, settings, number, one, budget)
        for other, earlier in enumerate(judges):
            if earlier.identity == judge.identity:
                raise UsageError(
                    f"`{section}.panel.{other}` and `{section}.panel.{number}` are the same judge, so its vote "
                    "would count twice",
                    hint="remove one of them",
                )
        judges.append(judge)
    given = Counter(judge.name for judge in judges)
    return [
        replace(judge, name=f"{judge.name} ({number})") if given[judge.name] > 1 else judge
        for number, judge in enumerate(judges)
    ]


def _local(context: StageContext[Any, Any], number: int, processes: ProcessGroup, *, alone: bool) -> Judge:
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
    context: StageContext[Any, Any], settings: JudgeSettings, number: int, one: JudgeModelSettings, budget: Budget
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
    context: StageContext[Any, Any], settings: JudgeSettings, judges: Sequence[Judge], runner: PanelRunner
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
    say(
        f"{context.stage.name}: the judges agree with the human rankings on {found.panel.rate} untied pairs of {source}"
    )
    report = json.dumps(found.to_json() | {"floor": settings.floor}, indent=2, ensure_ascii=False)
    (context.kept / CALIBRATION).write_text(report + "\n", encoding="utf-8")
    found.check(settings.floor, f"{context.stage.section}.judge")
    return found


def _human_rankings(context: StageContext[Any, Any], settings: JudgeSettings, source: str) -> list[Candidates]:
    """Human rankings. Several rankings of the same completions are several measurements, but one question."""
    from rlhf_cli.data.sources import iter_records
    from rlhf_cli.labeling.judges.questions import LETTERS, is_too_many

    data, skips = context.recipe.data, SkipLog(keep=1)
    too_many = f"more than {len(LETTERS)} completions, which `method: listwise` cannot show"
    records: list[Candidates] = []
    for record in iter_records(
        source, "candidates", columns=data.columns, comparison=data.comparison, on_skip=skips.add, keep_blank=True
    ):
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
