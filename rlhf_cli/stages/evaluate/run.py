"""The `evaluate` stage: the PPO policy against the SFT model on prompts that neither was trained on."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DataError
from rlhf_cli.progress import console, say, warn
from rlhf_cli.stages.base import StageOutcome
from rlhf_cli.stages.common import model_source, prompt_format, prompt_room
from rlhf_cli.stages.evaluate.sampling import base_answers, both_answers, rewarded
from rlhf_cli.stages.evaluate.stage import EvaluateContext
from rlhf_cli.stages.inputs import present

if TYPE_CHECKING:
    from rlhf_cli.data.chat_format import PromptFormat
    from rlhf_cli.data.records import Prompt, PromptRecord
    from rlhf_cli.data.sources import LoadedRecords
    from rlhf_cli.generation.policy import Answer
    from rlhf_cli.stages.evaluate.comparison import Comparison
    from rlhf_cli.stages.evaluate.settings import EvaluateSettings

_LONGEST = "evaluate.sampling.max_new_tokens"
_WIDEST = 100
"""Columns of what is printed: longer lines are tiring to read."""


def run(context: EvaluateContext) -> StageOutcome:
    """Sample both models' answers, judge them, print and save what was found. One model is in memory at a time."""
    from rlhf_cli.generation.policy import Sampling
    from rlhf_cli.stages.evaluate.comparison import comparison_metrics

    recipe, settings = context.recipe, context.settings
    sampling = Sampling(**settings.sampling.model_dump())
    prompts, loaded = _prompts(context, settings)
    repeated = [prompt for prompt in prompts for _ in range(settings.samples_per_prompt)]
    numbers = list(range(settings.samples_per_prompt)) * len(prompts)
    processes = ProcessGroup(model_source(recipe, context.inputs.baseline.source).device)
    ppo, sft, distances = both_answers(context, repeated, numbers, sampling, processes)
    reward = rewarded(context, repeated, sft, ppo, processes=processes)
    if not processes.is_main:
        return StageOutcome()
    shown = _shown_rows(len(repeated), settings)
    base = base_answers(context, [repeated[row] for row in shown], [numbers[row] for row in shown], sampling)
    gold = _judged(context, settings, repeated, sft, ppo)
    comparisons = _comparisons(repeated, sft, ppo, distances, gold, reward)
    if base is not None:
        own = [repeated[row] for row in shown]
        scores = _base_scores(context, settings, own, base)
        for row, answer, score in zip(shown, base, scores, strict=True):
            comparisons[row] = dataclasses.replace(comparisons[row], base=answer, base_score=score)
    metrics = comparison_metrics(
        comparisons, tie_margin=settings.tie_margin, resamples=settings.bootstrap, seed=recipe.seed
    )
    _save(context.output, comparisons, metrics, settings)
    if loaded.skips.total:
        loaded.skips.write(context.output / "skips.jsonl")
    _print(metrics, [comparisons[row] for row in shown], settings)
    return StageOutcome(metrics=metrics, skipped=loaded.skips.counts, summary=_summary(metrics, settings))


def not_chosen_on(records: list[PromptRecord], policy: Path) -> list[PromptRecord]:
    """Records but for those whose prompts decided which policy PPO wrote: it would look better on them than it is."""
    from rlhf_cli.data.records import prompt_key
    from rlhf_cli.stages.ppo.run import CHOSEN_ON

    if not (policy / CHOSEN_ON).is_file():
        return records
    chosen_on = set(json.loads((policy / CHOSEN_ON).read_text(encoding="utf-8")))
    left = [record for record in records if prompt_key(record.prompt) not in chosen_on]
    if len(left) < len(records):
        say(f"evaluate: {len(records) - len(left):,} prompts chose the policy (`ppo.kl_budget`) and are left out")
    return left


def _prompts(context: EvaluateContext, settings: EvaluateSettings) -> tuple[list[Prompt], LoadedRecords]:
    """Held-out prompts, each once, that leave both models room for an answer."""
    from rlhf_cli.data.records import prompt_key, prompt_text
    from rlhf_cli.data.sources import Skip, read_records
    from rlhf_cli.data.splits import split_by_prompt

    recipe, source = context.recipe, context.inputs.prompts.source
    loaded = read_records(source, "prompt", columns=recipe.data.columns, max_skip=recipe.data.max_skip)
    for line in loaded.warnings:
        warn(line)
    records = loaded.records
    if settings.prompts is None:
        _, records = split_by_prompt(records, recipe.data.holdout, recipe.seed)
    held_out, records = records, not_chosen_on(records, Path(context.inputs.policy.source))
    if held_out and not records:
        raise DataError(
            f"{source}: all of its {len(held_out):,} held-out prompts decided which policy PPO wrote (`ppo.kl_budget`)",
            hint="name prompts that had no part in it with `--set evaluate.prompts=PATH`, or hold out more",
        )
    if not records:
        raise DataError(
            f"{source}: none of its {len(loaded.records):,} prompts is held out "
            f"(`data.holdout: {recipe.data.holdout:g}`)",
            hint="name prompts that no stage trained on with `--set evaluate.prompts=PATH`, or hold out more",
        )
    fits = [_room(context, settings, name) for name in ("baseline", "policy")]
    kept: dict[str, Prompt] = {}
    for record in records:
        lengths = [(len(format.prompt_ids(record.prompt)), room) for format, room in fits]
        if all(length <= room for length, room in lengths):
            kept.setdefault(prompt_key(record.prompt), record.prompt)
        else:
            reason = f"prompt longer than {min(room for _, room in lengths):,} tokens"
            loaded.skips.add(Skip(record.location or source, reason, prompt_text(record.prompt)[:80]))
    loaded.skips.check(loaded.total, recipe.data.max_skip, source)
    if not kept:
        raise DataError(
            f"{source}: all {len(records):,} held-out prompts are too long", hint="raise `data.max_prompt_tokens`"
        )
    prompts = list(kept.values())
    if settings.max_prompts is not None and settings.max_prompts < len(prompts):
        chosen = random.Random(recipe.seed).sample(range(len(prompts)), settings.max_prompts)
        prompts = [prompts[place] for place in sorted(chosen)]
    return prompts, loaded


def _room(context: EvaluateContext, settings: EvaluateSettings, name: str) -> tuple[PromptFormat, int]:
    """How prompts reach one of the models, and the longest it takes."""
    from rlhf_cli.models.loading import load_config

    source = model_source(context.recipe, getattr(context.inputs, name).source)
    free = prompt_room(load_config(source), settings.sampling.max_new_tokens, f"`{source.path}`", _LONGEST)
    return prompt_format(context.recipe, source), min(context.recipe.data.max_prompt_tokens, free)


def _shown_rows(count: int, settings: EvaluateSettings) -> list[int]:
    """Rows spread evenly over all answers, so that neither the best nor the worst are picked."""
    wanted = min(settings.shown_samples, count)
    return [place * count // wanted for place in range(wanted)]


def _judged(
    context: EvaluateContext, settings: EvaluateSettings, prompts: Sequence[Prompt], *sides: Sequence[Answer]
) -> list[tuple[float, ...]] | None:
    """Gold scores of each prompt's answers, by the judge function; None where there is none."""
    from rlhf_cli.rewards.python_function import load_scoring_function
    from rlhf_cli.rewards.validation import finite_scores

    if settings.judge_function is None:
        return None
    function = load_scoring_function(present(context.inputs.judge_function))
    scores = (finite_scores(function, prompts, [answer.text for answer in side]) for side in sides)
    return list(zip(*scores, strict=True))


def _base_scores(
    context: EvaluateContext, settings: EvaluateSettings, prompts: Sequence[Prompt], answers: Sequence[Answer]
) -> list[float]:
    scores = _judged(context, settings, prompts, answers) or rewarded(context, prompts, answers)
    assert scores is not None
    return [score for (score,) in scores]


def _comparisons(
    prompts: Sequence[Prompt],
    sft: Sequence[Answer],
    ppo: Sequence[Answer],
    distances: Sequence[float] | None,
    gold: Sequence[tuple[float, ...]] | None,
    reward: Sequence[tuple[float, ...]] | None,
) -> list[Comparison]:
    from rlhf_cli.stages.evaluate.comparison import Comparison

    return [
        Comparison(
            prompt=prompt,
            sft=sft[row],
            ppo=ppo[row],
            kl=None if distances is None else distances[row],
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


def _print(metrics: dict[str, float], shown: Sequence[Comparison], settings: EvaluateSettings) -> None:
    from rlhf_cli.stages.evaluate.tables import metrics_table, side_by_side

    width = min(console.width, _WIDEST)
    for number, comparison in enumerate(shown, start=1):
        console.print(side_by_side(comparison, settings.tie_margin, number=number), width=width, soft_wrap=False)
    console.print(metrics_table(metrics), width=width, soft_wrap=False)
    if settings.judge_function is None:
        say("judged by the reward model that PPO was trained against: a check of training, not of quality")


def _summary(metrics: dict[str, float], settings: EvaluateSettings) -> list[tuple[str, str]]:
    judge = "judge" if settings.judge_function is not None else "reward model"
    win = f"{metrics['win_rate']:.1%} ({metrics['win_rate_low']:.1%} to {metrics['win_rate_high']:.1%}) by the {judge}"
    rows = [("PPO preferred to SFT", win)]
    if "gold/ppo_mean" in metrics:
        rows.append(("gold score", f"{metrics['gold/sft_mean']:.2f} -> {metrics['gold/ppo_mean']:.2f}"))
    if "reward/ppo_mean" in metrics:
        difference = f"{metrics['reward/difference']:+.2f} +- {metrics['reward/difference_se']:.2f}"
        rows.append(("reward", f"{metrics['reward/sft_mean']:.2f} -> {metrics['reward/ppo_mean']:.2f} ({difference})"))
    if "kl_nats" in metrics:
        rows.append(("KL", f"{metrics['kl_nats']:.1f} nats an answer"))
    rows.append(("length", f"{metrics['length/ratio']:.2f} of SFT's"))
    return rows
