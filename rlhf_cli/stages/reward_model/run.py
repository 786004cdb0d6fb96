"""The `train-rm` stage: from rankings to a reward model that says how far it can be trusted."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DataError
from rlhf_cli.generation.contract import read_contract
from rlhf_cli.generation.prompts import PromptStyle, prompt_style, token_ids
from rlhf_cli.intervals import ENOUGH_PROMPTS
from rlhf_cli.progress import task, warn
from rlhf_cli.stages.base import StageOutcome
from rlhf_cli.stages.common import (
    inherited_sampling,
    metrics_log,
    model_source,
    split_from,
    warn_of_rounding,
    warn_of_trained,
    write_contract,
)
from rlhf_cli.stages.precision import decide_precision
from rlhf_cli.stages.reward_model.stage import RewardModelContext

if TYPE_CHECKING:
    from rlhf_cli.data.records import Ranking
    from rlhf_cli.data.sources import LoadedRecords
    from rlhf_cli.generation.generator import Generator
    from rlhf_cli.models.reward_model.model import RewardModel
    from rlhf_cli.stages.reward_model.data import RankedGroup
    from rlhf_cli.stages.reward_model.evaluation import RankingReport
    from rlhf_cli.stages.reward_model.settings import RewardModelSettings

_PROMPTS_CHECKED = 64
"""Training prompts whose accuracy is reported beside the held-out accuracy, and held-out ones that the written model is
compared on."""


def run(context: RewardModelContext, generator: Generator | None = None) -> StageOutcome:
    """Train the reward model, measure it on held-out prompts, normalize its rewards and write it.

    Args:
        context: of the stage.
        generator: draws the completions that rewards are normalized over; None is that of `generation.engine`.
    """
    from rlhf_cli.data.chat_format import check_records
    from rlhf_cli.memory import free_memory
    from rlhf_cli.models.loading import load_tokenizer
    from rlhf_cli.models.reward_model.model import new_reward_model
    from rlhf_cli.models.reward_model.verification import probe_texts, save_trained_reward_model
    from rlhf_cli.stages.reward_model.normalization import normalize
    from rlhf_cli.stages.reward_model.trainer import RewardTrainer
    from rlhf_cli.training.flops import device_peak
    from rlhf_cli.training.monitoring.run_logger import METRICS, TIMING
    from rlhf_cli.training.monitoring.timing_log import append_evaluation, read_totals

    context = decide_precision(context)
    recipe, settings = context.recipe, context.settings
    loaded = _rankings(context, settings)
    start = context.inputs.policy.source
    source = model_source(recipe, start, quantized=True)
    style = prompt_style(recipe.data, start, load_tokenizer(source))
    _say_if_labeled_otherwise(context, style)
    warn_of_rounding(context, source)
    reward_model = new_reward_model(
        source,
        template=style.template,
        template_kwargs=style.kwargs,
        lora=settings.lora if settings.adapter == "lora" else None,
        seed=recipe.seed,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    check_records(reward_model.format, loaded.records)
    sampling = inherited_sampling(recipe, start)
    if not reward_model.is_encoder:  # completions may be drawn after training, and a wrong token must not end that
        token_ids(sampling.stop_tokens or (), reward_model.format)
    rankings, groups = _fitting(context, settings, reward_model, loaded)
    split = split_from(context, start)
    train, held_out = split.divide(rankings)
    if not held_out:
        raise DataError(
            f"{context.inputs.rankings.source}: none of its {len(rankings):,} rankings has a held-out prompt "
            f"(`data.holdout: {split.holdout:g}`), so nothing could say how good the reward model is",
            hint="give more prompts, or hold out more with `--set data.holdout=0.2`",
        )
    warn_of_trained(held_out, start, "its accuracy on them")
    processes = ProcessGroup(source.device)
    trainer = RewardTrainer(
        reward_model,
        [groups[id(ranking)] for ranking in train],
        settings,
        seed=recipe.seed,
        work=context.work,
        stop=context.stop,
        processes=processes,
        log=metrics_log(context),
        peak=device_peak(source.device, source.precision, processes),
    )
    state, steps, watch = trainer.train(), trainer.batches.steps, trainer.loop.watch
    del trainer
    free_memory()
    with watch.phase("eval", "evaluating"):
        report, train_accuracy = _report(context, reward_model, train, held_out, processes)
        if settings.normalize:
            normalize(context, reward_model, train, style, processes, generator)
    if not processes.is_main:
        return StageOutcome()
    append_evaluation(context.work, steps, watch.end_step())
    probe = probe_texts(
        reward_model, [(one.prompt, text) for one in held_out[:_PROMPTS_CHECKED] for text in one.completions]
    )
    difference = save_trained_reward_model(reward_model, context.output, probe=probe)
    write_contract(context, start, style, sampling, train)
    for name in (METRICS, TIMING):
        shutil.copyfile(context.work / name, context.output / name)
    if loaded.skips.total:
        loaded.skips.write(context.output / "skips.jsonl")
    if text := doubts(report):
        warn(text)
    metrics = _metrics(report, train_accuracy, reward_model) | {
        "rm/skipped_steps": float(state.skipped_steps),
        "rm/written_difference": difference,
    }
    return StageOutcome(
        metrics=metrics,
        skipped=loaded.skips.counts,
        summary=_summary(report, train_accuracy),
        timing=read_totals(context.work),
    )


def _say_if_labeled_otherwise(context: RewardModelContext, style: PromptStyle) -> None:
    """Say where the completions that were ranked had been drawn from a model that was prompted in another way."""
    labeled = read_contract(Path(context.inputs.rankings.source).parent)
    if labeled is None:
        return
    given = PromptStyle(labeled.prompt_template, labeled.template_kwargs)
    if given != style:
        warn(f"the ranked completions were drawn with prompts {given}; the reward model reads prompts {style}")


def _rankings(context: RewardModelContext, settings: RewardModelSettings) -> LoadedRecords:
    from rlhf_cli.data.sources import read_records

    data = context.recipe.data
    # Our own rankings have our own names of fields and may hold empty completions; the mapping is for users' files.
    is_ours = settings.data is None
    columns = {} if is_ours else data.columns
    loaded = read_records(
        context.inputs.rankings.source, "ranking", columns=columns, max_skip=data.max_skip, keep_blank=is_ours
    )
    for line in loaded.warnings:
        warn(line)
    if settings.use_margin and all(ranking.margin is None for ranking in loaded.records):
        raise DataError(
            f"{context.inputs.rankings.source}: `train_rm.use_margin` is set and no record has a `margin`",
            hint="leave `use_margin` out, or give each preference a number in `margin`",
        )
    return loaded


def _fitting(
    context: RewardModelContext, settings: RewardModelSettings, reward_model: RewardModel, loaded: LoadedRecords
) -> tuple[list[Ranking], dict[int, RankedGroup]]:
    """Rankings whose completions all fit the model, and their ids; the others are skipped and counted."""
    from rlhf_cli.data.records import prompt_text
    from rlhf_cli.data.sources import Skip
    from rlhf_cli.stages.reward_model.data import encode_group

    max_length = min(settings.max_length, reward_model.max_length)
    source = context.inputs.rankings.source
    kept: list[Ranking] = []
    groups: dict[int, RankedGroup] = {}
    with task("tokenizing rankings", len(loaded.records), "prompts") as bar:
        for ranking in loaded.records:
            group = encode_group(reward_model, ranking)
            bar.advance()
            if group.longest > max_length:
                excerpt = prompt_text(ranking.prompt)[:80]
                loaded.skips.add(
                    Skip(
                        ranking.location or source, f"prompt and completion longer than {max_length:,} tokens", excerpt
                    )
                )
                continue
            kept.append(ranking)
            groups[id(ranking)] = group
    loaded.skips.check(loaded.total, context.recipe.data.max_skip, source)
    return kept, groups


def _report(
    context: RewardModelContext,
    reward_model: RewardModel,
    train: Sequence[Ranking],
    held_out: Sequence[Ranking],
    processes: ProcessGroup,
) -> tuple[RankingReport, float]:
    """Agreement with the held-out rankings, and accuracy on some that were trained on."""
    from rlhf_cli.stages.reward_model.evaluation import accuracy, ranking_report, ranking_rewards

    seed = context.recipe.seed
    checked = random.Random(seed).sample(list(train), min(len(train), _PROMPTS_CHECKED))
    scores = ranking_rewards(context, reward_model, held_out, "scoring held-out rankings", processes)
    report = ranking_report(held_out, scores)
    return report, accuracy(
        checked, ranking_rewards(context, reward_model, checked, "scoring training rankings", processes)
    )


def doubts(report: RankingReport) -> str | None:
    """Return a sentence about an accuracy that shows no preference learned; None if it is above chance."""
    accuracy = f"{report.accuracy:.1%} ({report.low:.1%} to {report.high:.1%})"
    if report.low > 0.5:
        return None
    if report.high < 0.5:
        return (
            f"the held-out accuracy of {accuracy} is below chance: the rewards contradict the held-out rankings; check "
            "that the best completion stands first (or is `chosen`) in all of the data"
        )
    if report.prompts < ENOUGH_PROMPTS:
        return (
            f"{report.prompts:,} held-out {'prompt is' if report.prompts == 1 else 'prompts are'} too few to say "
            f"whether an accuracy of {report.accuracy:.1%} is better than chance; about {ENOUGH_PROMPTS} give an "
            "interval of +-10 points: label more, or raise `data.holdout`"
        )
    return f"the held-out accuracy of {accuracy} is no better than chance"


def _metrics(report: RankingReport, train_accuracy: float, reward_model: RewardModel) -> dict[str, float]:
    metrics = {
        "rm/accuracy": report.accuracy,
        "rm/accuracy_low": report.low,
        "rm/accuracy_high": report.high,
        "rm/always_longer": report.always_longer,
        "rm/always_shorter": report.always_shorter,
        "rm/train_accuracy": train_accuracy,
        "rm/calibration_error": report.calibration_error,
        "rm/mean_best": (report.mean_best - reward_model.mean) / reward_model.std,
        "rm/mean_worst": (report.mean_worst - reward_model.mean) / reward_model.std,
        "rm/lowest": (report.lowest - reward_model.mean) / reward_model.std,
        "rm/highest": (report.highest - reward_model.mean) / reward_model.std,
        "rm/prompts": float(report.prompts),
        "rm/pairs": float(report.pairs),
        "rm/ties": float(report.ties),
        "rm/mean": reward_model.mean,
        "rm/std": reward_model.std,
    }
    return metrics | {f"rm/accuracy_distance_{gap}": share for gap, (share, _) in report.by_distance.items()}


def _summary(report: RankingReport, train_accuracy: float) -> list[tuple[str, str]]:
    return [
        (
            "held-out accuracy",
            f"{report.accuracy:.1%} ({report.low:.1%} to {report.high:.1%}, {report.pairs:,} pairs of "
            f"{report.prompts:,} prompts)",
        ),
        ("always the longer completion", f"{report.always_longer:.1%}; the shorter {report.always_shorter:.1%}"),
        ("accuracy in training", f"{train_accuracy:.1%}"),
    ]
