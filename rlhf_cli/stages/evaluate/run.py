"""The `evaluate` stage: a policy against a baseline, on prompts that neither was trained on."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DataError
from rlhf_cli.generation.contract import keys_of, read_contract
from rlhf_cli.generation.prompts import PromptStyle
from rlhf_cli.intervals import ENOUGH_PROMPTS, is_undecided
from rlhf_cli.models.hub import local_folder
from rlhf_cli.progress import console, say, warn
from rlhf_cli.stages.base import StageOutcome
from rlhf_cli.stages.common import CHOSEN_ON, EXCERPT, split_from, write_contract
from rlhf_cli.stages.evaluate.sampling import Sampler, base_completions, compare, load_policies, rewarded
from rlhf_cli.stages.evaluate.stage import EvaluateContext
from rlhf_cli.stages.generation import choose_generator
from rlhf_cli.stages.inputs import present, source_of
from rlhf_cli.stages.precision import decide_precision
from rlhf_cli.training.timing import StepWatch

if TYPE_CHECKING:
    from rlhf_cli.data.records import Prompt, PromptRecord
    from rlhf_cli.data.sources import LoadedRecords
    from rlhf_cli.generation.generator import Completion, Generator
    from rlhf_cli.generation.policy import Policy
    from rlhf_cli.rewards.base import Reward
    from rlhf_cli.stages.evaluate.comparison import Comparison
    from rlhf_cli.stages.evaluate.settings import EvaluateSettings

_MAX_NEW_TOKENS = "evaluate.sampling.max_new_tokens"
_WIDEST = 100
"""Columns of what is printed: longer lines are tiring to read."""


def run(context: EvaluateContext, generator: Generator | None = None) -> StageOutcome:
    """Sample completions of both models, score them, print and save the results.

    Args:
        context: of the stage.
        generator: draws completions; None is that of `generation.engine`.
    """
    context = decide_precision(context)
    settings = context.settings
    policy, baseline = load_policies(context)
    prompts, loaded = _prompts(context, settings, (baseline, policy))
    judge = _judge(context, settings, loaded)
    repeated = [prompt for prompt in prompts for _ in range(settings.samples_per_prompt)]
    numbers = list(range(settings.samples_per_prompt)) * len(prompts)
    processes = ProcessGroup(policy.source.device)
    watch = StepWatch(policy.source.device)
    draws = choose_generator(context, [policy, baseline], generator)
    sampler = Sampler(context, draws, repeated, numbers, processes, watch)
    of_policy, of_baseline, kl = compare(sampler, policy, baseline)
    with sampler.watch.phase("scoring", "scoring"):
        reward = rewarded(context, repeated, of_baseline, of_policy, processes=processes)
    if not processes.is_main:
        return StageOutcome()
    with sampler.watch.phase("scoring", "scoring"):
        gold = judge and judge.scores(repeated, (baseline, of_baseline), (policy, of_policy))
    comparisons = _comparisons(repeated, of_baseline, of_policy, kl, gold, reward)
    shown = _shown_rows(len(repeated), settings)
    style = PromptStyle.of(policy.format)
    write_contract(context, context.inputs.policy.source, style, policy.sampling.settings(), ())
    _add_base(sampler, policy, settings, comparisons, shown, judge)
    outcome = _outcome(context, settings, comparisons, shown, loaded)
    outcome.timing.update(sampler.timing())
    return outcome


def _add_base(
    sampler: Sampler,
    policy: Policy,
    settings: EvaluateSettings,
    comparisons: list[Comparison],
    shown: Sequence[int],
    judge: Judge | None,
) -> None:
    """Add completions of the model before any training, with their scores, to the rows that are shown."""
    base = base_completions(sampler, policy, shown)
    if base is None:
        return
    _, completions = base
    prompts = [sampler.prompts[row] for row in shown]
    scores = judge.scores(prompts, base) if judge else rewarded(sampler.context, prompts, completions)
    assert scores is not None
    for row, completion, (score,) in zip(shown, completions, scores, strict=True):
        comparisons[row] = dataclasses.replace(comparisons[row], base=completion, base_score=score)


def _outcome(
    context: EvaluateContext,
    settings: EvaluateSettings,
    comparisons: Sequence[Comparison],
    shown: Sequence[int],
    loaded: LoadedRecords,
) -> StageOutcome:
    """Compute the metrics, save and print them with the samples."""
    from rlhf_cli.stages.evaluate.comparison import comparison_metrics

    metrics = comparison_metrics(comparisons, tie_margin=settings.tie_margin)
    names = model_names(context.inputs.baseline.source, context.inputs.policy.source)
    _save(context.output, comparisons, metrics, settings)
    if loaded.skips.total:
        loaded.skips.write(context.output / "skips.jsonl")
    _print(metrics, [comparisons[row] for row in shown], settings, names)
    if text := _undecided(metrics, settings):
        warn(text)
    return StageOutcome(metrics=metrics, skipped=loaded.skips.counts, summary=_summary(metrics, settings, names))


def not_trained_on(context: EvaluateContext, records: list[PromptRecord]) -> list[PromptRecord]:
    """Return the records that `evaluate.trained_prompts` allows.

    Raises:
        DataError: policy or baseline was trained on some of them, and the setting refuses that, or none is left.
    """
    from rlhf_cli.data.records import split_key

    inputs, action = context.inputs, context.settings.trained_prompts
    contracts = [read_contract(model.source) for model in (inputs.policy, inputs.baseline)]
    trained = frozenset[str]().union(*(contract.trained_prompts for contract in contracts if contract is not None))
    _warn_of_reward_model(context, records)
    left = [record for record in records if split_key(record.prompt) not in trained]
    if not (seen := len(records) - len(left)):
        return records
    found = f"{seen:,} of the {len(records):,} prompts to evaluate on were in the training of the policy or baseline"
    if action == "use":
        warn(f"{found}: the result says nothing about new prompts")
        return records
    if action == "refuse" or not left:
        raise DataError(
            f"{inputs.prompts.source}: {found}",
            hint=f"evaluate on the other {len(left):,} with `--set evaluate.trained_prompts=skip`"
            if left
            else "name prompts that no stage trained on with `--set evaluate.prompts=PATH`",
        )
    say(f"evaluate: {found}; they are skipped")
    return left


def _warn_of_reward_model(context: EvaluateContext, records: Sequence[PromptRecord]) -> None:
    """Warn of prompts that the reward model was trained on, where it decides which completion wins."""
    path = source_of(context.inputs.reward_model)
    if path is None or context.settings.judge_function is not None:
        return
    contract = read_contract(path)
    if contract is not None and (seen := len(keys_of(records) & contract.trained_prompts)):
        warn(f"the reward model that judges was trained on {seen:,} of the {len(records):,} prompts to evaluate on")


def not_chosen_on(records: list[PromptRecord], policy: Path) -> list[PromptRecord]:
    """Return the records without those whose prompts decided which policy PPO wrote: on these it looks too good."""
    from rlhf_cli.data.records import prompt_key

    if not (policy / CHOSEN_ON).is_file():
        return records
    chosen_on = set(json.loads((policy / CHOSEN_ON).read_text(encoding="utf-8")))
    left = [record for record in records if prompt_key(record.prompt) not in chosen_on]
    if len(left) < len(records):
        say(f"evaluate: {len(records) - len(left):,} prompts chose the policy (`ppo.kl_budget`) and are skipped")
    return left


def _prompts(
    context: EvaluateContext, settings: EvaluateSettings, policies: Sequence[Policy]
) -> tuple[list[Prompt], LoadedRecords]:
    """Read the held-out prompts, each once, that leave room for a completion in both models."""
    from rlhf_cli.data.records import prompt_key, prompt_text
    from rlhf_cli.data.sources import Skip, read_records

    recipe, source = context.recipe, context.inputs.prompts.source
    loaded = read_records(source, "prompt", columns=recipe.data.columns, max_skip=recipe.data.max_skip)
    for line in loaded.warnings:
        warn(line)
    records = loaded.records
    split = split_from(context, context.inputs.policy.source)
    if settings.prompts is None:
        records = [record for record in records if split.holds_out(record.prompt)]
    records = not_trained_on(context, records)
    held_out, records = records, not_chosen_on(records, local_folder(context.inputs.policy.source, with_weights=False))
    if held_out and not records:
        raise DataError(
            f"{source}: all of its {len(held_out):,} held-out prompts decided which policy PPO wrote (`ppo.kl_budget`)",
            hint="name other prompts with `--set evaluate.prompts=PATH`, or hold out more",
        )
    if not records:
        raise DataError(
            f"{source}: none of its {len(loaded.records):,} prompts is held out (`data.holdout: {split.holdout:g}`)",
            hint="name prompts that no stage trained on with `--set evaluate.prompts=PATH`, or hold out more",
        )
    limit = recipe.data.max_prompt_tokens
    longest = [min(limit, policy.longest_prompt(_MAX_NEW_TOKENS)) for policy in policies]
    kept: dict[str, Prompt] = {}
    for record in records:
        lengths = [len(policy.prompt_ids(record.prompt)) for policy in policies]
        if all(length <= most for length, most in zip(lengths, longest, strict=True)):
            kept.setdefault(prompt_key(record.prompt), record.prompt)
        else:
            reason = f"prompt longer than {min(longest):,} tokens"
            loaded.skips.add(Skip(record.location or source, reason, prompt_text(record.prompt)[:EXCERPT]))
    loaded.skips.check(loaded.total, recipe.data.max_skip, source)
    if not kept:
        raise DataError(
            f"{source}: all {len(records):,} held-out prompts are too long", hint="raise `data.max_prompt_tokens`"
        )
    prompts = list(kept.values())
    if settings.max_prompts is not None and settings.max_prompts < len(prompts):
        chosen = random.Random(recipe.seed).sample(range(len(prompts)), settings.max_prompts)
        prompts = [prompts[position] for position in sorted(chosen)]
    return prompts, loaded


def _shown_rows(count: int, settings: EvaluateSettings) -> list[int]:
    """Return rows spread evenly over all completions, so that neither the best nor the worst are picked."""
    shown = min(settings.shown_samples, count)
    return [position * count // shown for position in range(shown)]


@dataclasses.dataclass(frozen=True)
class Judge:
    """The judge function.

    Attributes:
        function: the function.
        references: see `references_of`.
    """

    function: Reward
    references: Mapping[str, Any]

    def scores(self, prompts: Sequence[Prompt], *sides: tuple[Policy, Sequence[Completion]]) -> list[tuple[float, ...]]:
        """Return the gold scores of each prompt's completions.

        Args:
            prompts: N prompts.
            sides: policies with their N completions.
        """
        from rlhf_cli.rewards.base import columns_of
        from rlhf_cli.rewards.validation import finite_scores

        found = []
        for policy, completions in sides:
            columns = columns_of(prompts, self.references, completions, partial(policy.decode, raw=True))
            texts = [completion.text for completion in completions]
            found.append(finite_scores(self.function, prompts, texts, columns))
        return list(zip(*found, strict=True))


def _judge(context: EvaluateContext, settings: EvaluateSettings, loaded: LoadedRecords) -> Judge | None:
    """Load the judge function before anything is sampled; None if the reward model decides."""
    from rlhf_cli.data.records import references_of
    from rlhf_cli.rewards.python_function import load_scoring_function

    if settings.judge_function is None:
        return None
    return Judge(load_scoring_function(present(context.inputs.judge_function)), references_of(loaded.records))


def _comparisons(
    prompts: Sequence[Prompt],
    baseline: Sequence[Completion],
    policy: Sequence[Completion],
    kl: Sequence[float] | None,
    gold: Sequence[tuple[float, ...]] | None,
    reward: Sequence[tuple[float, ...]] | None,
) -> list[Comparison]:
    from rlhf_cli.stages.evaluate.comparison import Comparison

    return [
        Comparison(
            prompt=prompt,
            baseline=baseline[row],
            policy=policy[row],
            kl=None if kl is None else kl[row],
            gold=None if gold is None else (gold[row][0], gold[row][1]),
            reward=None if reward is None else (reward[row][0], reward[row][1]),
        )
        for row, prompt in enumerate(prompts)
    ]


def _save(
    output: Path, comparisons: Sequence[Comparison], metrics: dict[str, float], settings: EvaluateSettings
) -> None:
    with (output / "samples.jsonl").open("w", encoding="utf-8") as file:
        for comparison in comparisons:
            file.write(json.dumps(comparison.to_json(settings.tie_margin), ensure_ascii=False) + "\n")
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def model_names(baseline: str, policy: str) -> tuple[str, str]:
    """Return what people call two models: `RUN/STAGE` for an artifact, else the folder's name or the hub id."""
    short = (_model_name(baseline), _model_name(policy))
    return short if short[0] != short[1] or baseline == policy else (baseline, policy)


def _model_name(source: str) -> str:
    folder = Path(source)
    if not folder.is_dir():
        return source
    folder = folder.resolve()
    return f"{folder.parent.name}/{folder.name}" if (folder / "manifest.json").is_file() else folder.name


def _print(
    metrics: dict[str, float], shown: Sequence[Comparison], settings: EvaluateSettings, names: tuple[str, str]
) -> None:
    from rlhf_cli.stages.evaluate.tables import metrics_table, side_by_side

    width = min(console.width, _WIDEST)
    for number, comparison in enumerate(shown, start=1):
        console.print(side_by_side(comparison, settings.tie_margin, number=number), width=width, soft_wrap=False)
    console.print(metrics_table(metrics, names), width=width, soft_wrap=False)
    if settings.judge_function is None:
        say("judged by a reward model: where PPO was trained against it, this is a check of training, not of quality")


def _undecided(metrics: dict[str, float], settings: EvaluateSettings) -> str | None:
    """Return a sentence about a win rate that does not say which model is better; None if it does."""
    prompts, low, high = int(metrics["prompts"]), metrics["win_rate_low"], metrics["win_rate_high"]
    if not is_undecided(low, high):
        return None
    if prompts >= ENOUGH_PROMPTS:
        return f"a win rate of {metrics['win_rate']:.1%} of {prompts:,} prompts does not show which model is better"
    if settings.max_prompts == prompts:
        more = "raise `evaluate.max_prompts`"
    else:
        more = "add to `evaluate.prompts`" if settings.prompts else "raise `data.holdout` or set `evaluate.prompts`"
    return (
        f"{prompts:,} {'prompt is' if prompts == 1 else 'prompts are'} too few to say which model is better; about "
        f"{ENOUGH_PROMPTS} give an interval of +-10 points: {more}"
    )


def _summary(metrics: dict[str, float], settings: EvaluateSettings, names: tuple[str, str]) -> list[tuple[str, str]]:
    judge = "judge" if settings.judge_function is not None else "reward model"
    win = f"{metrics['win_rate']:.1%} ({metrics['win_rate_low']:.1%} to {metrics['win_rate_high']:.1%}) by the {judge}"
    baseline, policy = names
    rows = [(f"{policy} preferred to {baseline}", win)]
    if "gold/policy_mean" in metrics:
        rows.append(("gold score", f"{metrics['gold/baseline_mean']:.2f} -> {metrics['gold/policy_mean']:.2f}"))
    if "reward/policy_mean" in metrics:
        difference = f"{metrics['reward/difference']:+.2f} +- {metrics['reward/difference_se']:.2f}"
        rows.append(
            ("reward", f"{metrics['reward/baseline_mean']:.2f} -> {metrics['reward/policy_mean']:.2f} ({difference})")
        )
    if "kl_nats" in metrics:
        rows.append(("KL", f"{metrics['kl_nats']:.1f} nats per completion"))
    rows.append(("length", f"{metrics['length/ratio']:.2f} of the baseline's"))
    return rows
