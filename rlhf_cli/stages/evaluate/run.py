"""The `evaluate` stage: policies against a baseline, on prompts that none was trained on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.console import console
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import UsageError
from rlhf_cli.generation.prompts import PromptStyle
from rlhf_cli.intervals import ENOUGH_PROMPTS, percent, percent_span
from rlhf_cli.progress import say, warn
from rlhf_cli.stages.base import StageOutcome
from rlhf_cli.stages.common import write_contract
from rlhf_cli.stages.evaluate.base_model import base_rows, shown_rows
from rlhf_cli.stages.evaluate.demonstrations import load_demonstrations
from rlhf_cli.stages.evaluate.judge import Judge, load_judge, panel_verdicts
from rlhf_cli.stages.evaluate.people import ITEMS, items_of, load_labels, people_verdicts
from rlhf_cli.stages.evaluate.policies import load_policies
from rlhf_cli.stages.evaluate.prompts import load_prompts
from rlhf_cli.stages.evaluate.rewards import rewarded
from rlhf_cli.stages.evaluate.sampling import Sampler, measure
from rlhf_cli.stages.evaluate.scores import ScoreFile
from rlhf_cli.stages.evaluate.stage import EvaluateContext
from rlhf_cli.stages.generation import choose_generator
from rlhf_cli.stages.model_names import model_names
from rlhf_cli.stages.precision import decide_precision
from rlhf_cli.stages.sharding import require_processes
from rlhf_cli.training.timing import StepWatch

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rlhf_cli.data.sources import LoadedRecords
    from rlhf_cli.generation.generator import Completion, Generator
    from rlhf_cli.stages.evaluate.comparison import Comparison
    from rlhf_cli.stages.evaluate.results import Evaluation, Pair, PanelVerdicts
    from rlhf_cli.stages.evaluate.settings import EvaluateSettings
    from rlhf_cli.stages.evaluate.sides import Side

_WIDEST = 100
"""Columns of what is printed: longer lines are tiring to read."""


def run(context: EvaluateContext, generator: Generator | None = None) -> StageOutcome:
    """Sample completions of all models, score them, print and save the results.

    Args:
        context: of the stage.
        generator: draws completions; None is that of `generation.engine`.
    """
    require_processes(context.recipe)
    context = decide_precision(context)
    settings = context.settings
    policies, baseline = load_policies(context)
    names = names_of(context)
    labels = load_labels(context)
    prompts, loaded = load_prompts(context, settings, (baseline, *policies), labels)
    demonstrations = load_demonstrations(context, (baseline, *policies))
    judge = load_judge(context, loaded)
    _announce(len(prompts))
    repeated = [prompt for prompt in prompts for _ in range(settings.samples_per_prompt)]
    numbers = list(range(settings.samples_per_prompt)) * len(prompts)
    device = policies[0].source.device
    processes = ProcessGroup(device)
    draws = choose_generator(context, [*policies, baseline], generator)
    sampler = Sampler(context, draws, repeated, numbers, processes, StepWatch(device))
    of_baseline, of_policies = measure(
        sampler, list(zip(names[1:], policies, strict=True)), (names[0], baseline), demonstrations
    )
    with sampler.watch.phase("scoring", "scoring"):
        of_baseline, *of_policies = _scored(sampler, [of_baseline, *of_policies], judge)
        sides = [of_baseline, *of_policies]
        verdicts = panel_verdicts(context, repeated, sides, processes)
        if labels is not None:
            verdicts = people_verdicts(labels, repeated, sides)
    base = base_rows(sampler, of_policies[0].policy, judge)
    if not processes.is_main:
        return StageOutcome()
    style = PromptStyle.of(policies[0].format)
    write_contract(context, context.inputs.policy.source, style, policies[0].sampling.settings(), ())
    outcome = _outcome(sampler, of_baseline, of_policies, base, verdicts, loaded)
    outcome.timing.update(sampler.timing())
    return outcome


def _announce(prompts: int) -> None:
    """Say how precise the result will be, while it can still be changed."""
    from rlhf_cli.statistics.wording import expected_precision

    count = f"{prompts:,} prompt{'' if prompts == 1 else 's'}"
    say(f"evaluate: {count}: a win rate near 50% will be known to {expected_precision(prompts)}")


def _scored(sampler: Sampler, sides: list[Side], judge: Judge | None) -> list[Side]:
    """Add rewards and gold scores to what was measured; all processes call this."""
    context, processes = sampler.context, sampler.processes
    file = ScoreFile(context.work / "rewards.jsonl", processes)
    completions = [side.completions for side in sides]
    if (rewards := rewarded(context, sampler.prompts, *completions, file=file, processes=processes)) is not None:
        sides = [dataclasses.replace(side, reward=own) for side, own in zip(sides, rewards, strict=True)]
    return sides if judge is None else [_judged(sampler, side, number, judge) for number, side in enumerate(sides)]


def _judged(sampler: Sampler, side: Side, number: int, judge: Judge) -> Side:
    """Add gold scores, which rank 0 computes: the function is the user's own."""

    def score(rows: list[int]) -> list[float]:
        own = judge.scores(sampler.prompts, side.policy, side.completions) if sampler.processes.is_main else []
        return sampler.processes.all_gather_object(own)[0]

    count = len(sampler.prompts)
    file = ScoreFile(sampler.context.work / f"gold_{number}.jsonl", sampler.processes)
    return dataclasses.replace(side, gold=file.fill(count, score, chunk=count))


def _outcome(
    sampler: Sampler,
    baseline: Side,
    policies: Sequence[Side],
    base: Mapping[int, tuple[Completion, float | None]],
    verdicts: PanelVerdicts | None,
    loaded: LoadedRecords,
) -> StageOutcome:
    """Compute the results, save and print them with the samples."""
    from rlhf_cli.stages.evaluate.comparison import comparison_metrics
    from rlhf_cli.stages.evaluate.results import comparisons_of, evaluation_of

    context, prompts = sampler.context, sampler.prompts
    settings = context.settings
    comparisons = [
        comparisons_of(prompts, policy, baseline, None if verdicts is None else verdicts[0, number])
        for number, policy in enumerate(policies, start=1)
    ]
    shown = shown_rows(len(prompts), settings)
    for row, (completion, score) in base.items():
        comparisons[0][row] = dataclasses.replace(comparisons[0][row], base=completion, base_score=score)
    evaluation = evaluation_of(
        prompts, baseline, policies, decided_by=settings.decided_by, tie_margin=settings.tie_margin, verdicts=verdicts
    )
    metrics = comparison_metrics(comparisons[0], tie_margin=settings.tie_margin) | evaluation.flat_metrics()
    rows = [
        dict(zip((policy.name for policy in policies[1:]), row, strict=True))
        for row in zip(*comparisons[1:], strict=True)
    ]
    others = rows or [{} for _ in prompts]
    _save(context.output, comparisons[0], others, metrics, evaluation, settings)
    with (context.output / ITEMS).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in items_of(prompts, [baseline, *policies]))
    if loaded.skips.total:
        loaded.skips.write(context.output / "skips.jsonl")
    _print(metrics, [(comparisons[0][row], others[row]) for row in shown], evaluation, settings)
    return StageOutcome(metrics=metrics, skipped=loaded.skips.counts, summary=_summary(metrics, evaluation, settings))


def _save(
    output: Path,
    comparisons: Sequence[Comparison],
    others: Sequence[dict[str, Comparison]],
    metrics: dict[str, float],
    evaluation: Evaluation,
    settings: EvaluateSettings,
) -> None:
    with (output / "samples.jsonl").open("w", encoding="utf-8") as file:
        for comparison, more in zip(comparisons, others, strict=True):
            row = comparison.to_json(settings.tie_margin)
            if more:
                row["policies"] = {name: one.policy_to_json(settings.tie_margin) for name, one in more.items()}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    text = json.dumps(evaluation.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    (output / "evaluation.json").write_text(text + "\n", encoding="utf-8")


def names_of(context: EvaluateContext) -> list[str]:
    """Return the names of the baseline and of the policies.

    Raises:
        UsageError: two policies have the same name.
    """
    inputs = context.inputs
    evaluated = [one.source for one in inputs.evaluated]
    names = list(model_names(inputs.baseline.source, *evaluated))
    given = [one.name for one in context.settings.policies]
    # `policies` fills the last inputs; without a policy of its own its first entry is the first input.
    for position, name in enumerate(given, start=len(names) - len(given)):
        names[position] = name or names[position]
    best_of = context.settings.best_of(len(evaluated))
    for position, n in enumerate(best_of, start=1):
        if n > 1 and given[position - len(names)] is None:
            names[position] = f"best of {n} of {names[position]}"
    names[1:] = [f"{name} (policy)" if name == names[0] else name for name in names[1:]]
    for position, name in enumerate(names):
        if name in names[:position]:
            raise UsageError(
                f"two models of the evaluation are called `{name}`",
                hint="give each a name of its own: `--also NAME=MODEL`, or `name` in `evaluate.policies`",
            )
    return names


def _print(
    metrics: dict[str, float],
    shown: Sequence[tuple[Comparison, dict[str, Comparison]]],
    evaluation: Evaluation,
    settings: EvaluateSettings,
) -> None:
    from rlhf_cli.stages.evaluate.tables import metrics_table, models_table, pairs_table, side_by_side, tasks_table

    width = min(console.width, _WIDEST)

    def show(what: RenderableType) -> None:
        console.print(what, width=width, soft_wrap=False)

    for number, (comparison, others) in enumerate(shown, start=1):
        show(side_by_side(comparison, settings.tie_margin, number=number, others=others))
    if len(evaluation.against_baseline) == 1:
        show(metrics_table(metrics, tuple(evaluation.models)))
    else:
        show(models_table(evaluation))
        show(pairs_table(evaluation))
    if (tasks := tasks_table(evaluation)) is not None:
        show(tasks)
    if settings.decided_by == "reward model":
        say("judged by a reward model: where PPO was trained against it, this is a check of training, not of quality")
        if any(one.best_of > 1 for one in settings.policies):
            warn("the reward model that judges also chose the best of n, so best of n wins for that reason alone")
    for pair in evaluation.pairs:
        _tell(pair, settings)


def _tell(pair: Pair, settings: EvaluateSettings) -> None:
    """Say what a pair shows; warn where its estimates of the KL differ, or which model is better is not shown."""
    if pair.kl_disagreement is not None:
        k1, k3 = (found.mean.value for found in pair.kl)
        warn(
            f"KL of {pair.policy}: {k1:.3g} nats by k1, {k3:.3g} by k3; chance does not explain this: "
            f"{pair.kl_disagreement}"
        )
    rate = pair.win_rate
    if pair.is_decided:
        say(pair.conclusion)
        return
    if settings.max_prompts == rate.n:
        more = "raise `evaluate.max_prompts`"
    else:
        more = "add to `evaluate.prompts`" if settings.prompts else "raise `data.holdout` or set `evaluate.prompts`"
    few = f"; about {ENOUGH_PROMPTS} give an interval of +-10 points" if rate.n < ENOUGH_PROMPTS else ""
    warn(f"{pair.conclusion}{few}: {more}")


def _summary(metrics: dict[str, float], evaluation: Evaluation, settings: EvaluateSettings) -> list[tuple[str, str]]:
    judge = {"function": "judge"}.get(settings.decided_by, settings.decided_by)
    rows = []
    for pair in evaluation.against_baseline:
        rate = pair.win_rate
        win = f"{percent(rate.value)} ({percent_span(rate.low, rate.high)}) by the {judge}"
        rows.append((f"{pair.policy} preferred to {pair.baseline}", win))
    if len(rows) > 1:
        return rows
    if "gold/policy_mean" in metrics:
        rows.append(("gold score", f"{metrics['gold/baseline_mean']:.2f} -> {metrics['gold/policy_mean']:.2f}"))
    if "reward/policy_mean" in metrics:
        difference = f"{metrics['reward/difference']:+.2f}, standard error {metrics['reward/difference_se']:.2f}"
        rows.append(
            ("reward", f"{metrics['reward/baseline_mean']:.2f} -> {metrics['reward/policy_mean']:.2f} ({difference})")
        )
    if "kl_nats" in metrics:
        rows.append(("KL", f"{metrics['kl_nats']:.1f} nats per completion"))
    rows.append(("length", f"{metrics['length/ratio']:.2f} of the baseline's"))
    return rows
