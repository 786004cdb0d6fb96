"""The `label` stage: K completions per prompt, ranked; or imported rankings, in the same format."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.data.records import Prompt, Ranking, prompt_text
from rlhf_cli.data.skips import Skip
from rlhf_cli.distributed.ranks import is_main
from rlhf_cli.errors import DataError
from rlhf_cli.generation.generator import Completion
from rlhf_cli.intervals import percent
from rlhf_cli.labeling.exports.rows import ranking_to_json
from rlhf_cli.labeling.scoring import (
    CompletionScorer,
    FunctionScorer,
    RankingStatistics,
    RewardModelScorer,
    score_completions,
    tiers_from_scores,
)
from rlhf_cli.progress import task, warn
from rlhf_cli.stages.base import StageOutcome
from rlhf_cli.stages.common import EXCERPT, load_reward_model
from rlhf_cli.stages.inputs import present, source_of
from rlhf_cli.stages.label.sampling import (
    ALL_EQUAL,
    Effort,
    Sampled,
    check_count,
    distinct,
    given_completions,
    sample_completions,
)
from rlhf_cli.stages.label.stage import LabelContext
from rlhf_cli.stages.precision import decide_precision
from rlhf_cli.stages.sharding import require_processes
from rlhf_cli.training.monitoring.step_lines import read_rows
from rlhf_cli.training.monitoring.timing_log import TIMING, Work, append_attempt, timing_row, totals

if TYPE_CHECKING:
    from rlhf_cli.generation.generator import Generator
    from rlhf_cli.stages.completions import Receive
    from rlhf_cli.stages.label.settings import LabelSettings


def run(context: LabelContext, generator: Generator | None = None) -> StageOutcome:
    """Write `rankings.jsonl`.

    Args:
        context: of the stage.
        generator: draws completions; None is that of `generation.engine`.
    """
    if context.settings.by == "import":
        return _import(context) if is_main() else StageOutcome()
    attempt = _Attempt(context.work)
    try:
        outcome = _ranked(context, generator, attempt)
    except BaseException:  # as when labels are missing; the next attempt continues, and its time is not all
        if is_main():
            attempt.keep()
        raise
    return replace(outcome, timing=attempt.totals() | outcome.timing)


class _Attempt:
    """Times of this attempt of the stage, and of those before it.

    Args:
        work: folder of the stage, which all attempts share.
    """

    def __init__(self, work: Path) -> None:
        self.effort = Effort()
        self._work, self._began = work, time.monotonic()

    def keep(self) -> None:
        """Write the times for the next attempt. Where that fails, it is a warning: the attempt has its own error."""
        try:
            append_attempt(self._work, self._row())
        except OSError as error:
            warn(f"cannot write {self._work / TIMING} ({error.strerror or error}): the time of this attempt is lost")

    def totals(self) -> dict[str, float]:
        """Sums over all attempts; see `timing_log.totals`."""
        return totals([*read_rows(self._work / TIMING), self._row()])

    def _row(self) -> dict[str, float]:
        tokens = sum(one.tokens for one in self.effort.drawings)
        row = timing_row(self.effort.watch.end_step(), {"rollout": Work(tokens)})
        return row | {"time/step": time.monotonic() - self._began}


def _ranked(context: LabelContext, generator: Generator | None, attempt: _Attempt) -> StageOutcome:
    settings = context.settings
    if settings.loads_model:
        require_processes(context.recipe)
    context = decide_precision(context)
    if settings.samples:
        sampled = sample_completions(context, settings, attempt.effort, generator, _session_for(context, settings))
    else:
        sampled = given_completions(context, settings, attempt.effort)
    if settings.active_learning is not None:
        from rlhf_cli.stages.label.active_learning import select_candidates

        sampled = select_candidates(context, settings.active_learning, sampled)
    if settings.by in ("human", "judge"):
        return _compared(context, settings, sampled)
    return _scored(context, settings, sampled)


def _session_for(
    context: LabelContext, settings: LabelSettings
) -> Callable[[Mapping[int, Prompt]], AbstractContextManager[Receive]] | None:
    """Return what opens a session for annotators while completions are sampled; None if they have to wait for all."""
    if not settings.samples_for_people:
        return None
    from rlhf_cli.stages.label.growing_session import growing_session

    return partial(growing_session, context)


def _scored(context: LabelContext, settings: LabelSettings, sampled: Sampled) -> StageOutcome:
    """By a function or a reward model, which score each completion alone."""
    processes = sampled.processes
    pairs = [(row.prompt, list(row.completions)) for row in sampled.candidates]
    with sampled.watch.phase("scoring", "scoring"):
        if settings.by == "function":  # the user's code: it runs once, in one process
            scores = _scores(context, settings, sampled, pairs) if processes.is_main else []
        else:
            scores = processes.map(pairs, partial(_scores, context, settings, sampled))
    if not processes.is_main:
        return StageOutcome()
    rankings = [
        Ranking(row.prompt, row.completions, tiers_from_scores(numbers, settings.tie_margin))
        for row, numbers in zip(sampled.candidates, scores, strict=True)
    ]
    write_rankings(context.output / "rankings.jsonl", rankings, scores)
    return _outcome(context, rankings, sampled, [score for numbers in scores for score in numbers])


def _compared(context: LabelContext, settings: LabelSettings, sampled: Sampled) -> StageOutcome:
    """By people or judges, who compare completions; completions of the same text are shown to them once."""
    candidates = []
    for row in map(distinct, sampled.candidates):
        check_count(row)
        if len(row.completions) > 1:
            candidates.append(row)
        else:
            sampled.skips.add(Skip(row.location, ALL_EQUAL, prompt_text(row.prompt)[:EXCERPT]))
    if not candidates:
        raise DataError(
            "there is nothing to compare: every prompt's completions are equal to one another",
            hint="sample at a higher temperature, or from a model that is trained less",
        )
    if equal := len(sampled.candidates) - len(candidates):
        warn(f"{equal:,} of {len(sampled.candidates):,} prompts have completions that are all equal; they are skipped")
    if settings.by == "human":
        if not sampled.processes.is_main:
            return StageOutcome()
        from rlhf_cli.stages.label.human import run_human

        found = run_human(context, candidates)
        skipped: dict[str, int] = {}
        timing = found.timing
    else:
        from rlhf_cli.stages.label.judge import run_judges

        with sampled.watch.phase("scoring", "judging"):
            found = run_judges(context, candidates, sampled.processes)
        skipped, timing = found.skipped, {}
    if not sampled.processes.is_main:
        return StageOutcome()
    rankings = [ranking for ranking in found.rankings if ranking is not None]
    if not rankings:
        raise DataError("no rankings were produced", hint="see the reasons in skips.jsonl")
    write_rankings(context.output / "rankings.jsonl", rankings)
    outcome = _outcome(context, rankings, sampled)
    return StageOutcome(
        outcome.metrics | found.metrics,
        outcome.skipped | skipped,
        [*outcome.summary, *found.summary],
        timing,
    )


def _import(context: LabelContext) -> StageOutcome:
    from rlhf_cli.data.sources import read_records

    data = context.recipe.data
    loaded = read_records(
        present(context.inputs.rankings),
        "ranking",
        columns=data.columns,
        comparison=data.comparison,
        max_skip=data.max_skip,
    )
    write_rankings(context.output / "rankings.jsonl", loaded.records)
    if loaded.skips.total:
        loaded.skips.write(context.output / "skips.jsonl")
    metrics, summary = _metrics_of(RankingStatistics.of(loaded.records))
    return StageOutcome(metrics, loaded.skips.counts, summary)


def _scores(
    context: LabelContext, settings: LabelSettings, sampled: Sampled, pairs: Sequence[tuple[Prompt, list[str]]]
) -> list[list[float]]:
    """Scores of each prompt's completions."""
    scorer = _scorer(context, settings, sampled)
    prompts, texts = [prompt for prompt, _ in pairs], [completions for _, completions in pairs]
    total = sum(len(row.completions) for row in sampled.candidates)
    with task("scoring completions", total, "completions", share=sum(map(len, texts))) as bar:
        return score_completions(scorer, prompts, texts, stop=context.stop.check, progress=bar.advance)


def _scorer(context: LabelContext, settings: LabelSettings, sampled: Sampled) -> CompletionScorer:
    if settings.by == "function":
        from rlhf_cli.rewards.python_function import load_scoring_function

        return FunctionScorer(load_scoring_function(present(context.inputs.function)), sampled.columns)
    model = load_reward_model(context, present(context.inputs.reward_model), policy=source_of(context.inputs.policy))
    return RewardModelScorer(model, settings.sampling.batch_size)


def write_rankings(path: Path, rankings: Sequence[Ranking], scores: Sequence[Sequence[float]] | None = None) -> None:
    """Write rankings as `rlhf train-rm` and people read them, one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for number, ranking in enumerate(rankings):
            row = ranking_to_json(ranking)
            if scores is not None:
                row["scores"] = list(scores[number])
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _outcome(
    context: LabelContext, rankings: Sequence[Ranking], sampled: Sampled, scores: Sequence[float] = ()
) -> StageOutcome:
    """Statistics of rankings and their completions; writes the skipped records."""
    if sampled.skips.total:
        sampled.skips.write(context.output / "skips.jsonl")
    metrics, summary = _metrics_of(RankingStatistics.of(rankings))
    if scores:
        metrics["mean_score"] = sum(scores) / len(scores)
    if sampled.completions:
        metrics |= _of_completions([completion for group in sampled.completions for completion in group], summary)
    return StageOutcome(metrics, sampled.skips.counts, summary)


def _metrics_of(statistics: RankingStatistics) -> tuple[dict[str, float], list[tuple[str, str]]]:
    metrics = {
        "prompts": float(statistics.prompts),
        "completions": float(statistics.completions),
        "mean_tiers": statistics.mean_tiers,
        "tie_share": statistics.tie_share,
        "mean_characters": statistics.mean_characters,
    }
    summary = [
        ("rankings", f"{statistics.prompts:,} prompts, {statistics.completions:,} completions"),
        ("ties", f"{percent(statistics.tie_share)} of pairs"),
    ]
    if statistics.longest_wins is not None:
        metrics["longer_wins_share"] = statistics.longest_wins
        summary.append(("longer completion wins", f"{percent(statistics.longest_wins)} of untied pairs"))
    return metrics, summary


def _of_completions(completions: Sequence[Completion], summary: list[tuple[str, str]]) -> dict[str, float]:
    empty = sum(not completion.text for completion in completions)
    metrics = {
        "mean_tokens": sum(len(completion.ids) for completion in completions) / len(completions),
        "finished_share": sum(completion.finished for completion in completions) / len(completions),
        "empty_share": empty / len(completions),
    }
    summary.append(
        ("completions", f"{metrics['mean_tokens']:.1f} tokens, {percent(metrics['finished_share'])} finished")
    )
    if empty:
        warn(f"{empty:,} of {len(completions):,} sampled completions are empty")
    return metrics
