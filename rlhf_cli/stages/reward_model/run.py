"""The `train-rm` stage: from rankings to a reward model, or several, that say how far they can be trusted."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rlhf_cli.models.reward_model.members import MEMBER_DEPTH, member_folder
from rlhf_cli.progress import say, warn
from rlhf_cli.stages.base import StageOutcome
from rlhf_cli.stages.common import metrics_log, write_contract
from rlhf_cli.stages.precision import decide_precision
from rlhf_cli.stages.reward_model.plan import PROMPTS_CHECKED, Plan, make_plan, member_seed, new_member
from rlhf_cli.stages.reward_model.stage import RewardModelContext
from rlhf_cli.stages.sharding import require_processes

if TYPE_CHECKING:
    from rlhf_cli.data.records import Ranking
    from rlhf_cli.generation.generator import Generator
    from rlhf_cli.models.reward_model.model import RewardModel
    from rlhf_cli.rewards.estimates import Measured
    from rlhf_cli.stages.reward_model.trainer import RewardTrainer


@dataclass(frozen=True)
class Member:
    """A reward model that was trained, measured and written.

    Attributes:
        held_out: raw rewards of the held-out rankings.
        checked: raw rewards of some training rankings.
        mean: of the normalization.
        std: of the normalization.
        metrics: of its training.
    """

    held_out: list[list[float]]
    checked: list[list[float]]
    mean: float
    std: float
    metrics: dict[str, float]


def run(context: RewardModelContext, generator: Generator | None = None) -> StageOutcome:
    """Train the reward model or the members of an ensemble, measure, normalize and write them.

    Args:
        context: of the stage.
        generator: draws the completions that rewards are normalized over; None is that of `generation.engine`.
    """
    from rlhf_cli.memory import free_memory
    from rlhf_cli.training.monitoring.timing_log import read_totals

    require_processes(context.recipe)
    context = decide_precision(context)
    plan, reward_model = make_plan(context)
    members: list[Member] = []
    for number in range(1, context.settings.members + 1):
        if number > 1:
            reward_model = new_member(context, plan.source, plan.style, number)
        members.append(_member(context, plan, number, reward_model, generator))
        del reward_model
        free_memory()
    curve = _data_curve(context, plan)
    if not plan.processes.is_main:
        return StageOutcome()
    write_contract(context, context.inputs.policy.source, plan.style, plan.sampling, plan.train)
    if plan.loaded.skips.total:
        plan.loaded.skips.write(context.output / "skips.jsonl")
    metrics, summary = _report(context, plan, members, curve)
    return StageOutcome(
        metrics=metrics, skipped=plan.loaded.skips.counts, summary=summary, timing=read_totals(context.work)
    )


def _report(
    context: RewardModelContext, plan: Plan, members: Sequence[Member], curve: dict[float, Measured]
) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """Write and say how good the reward model is; of several members, the mean of their normalized rewards."""
    from rlhf_cli.stages.reward_model.evaluation import accuracy, ranking_report
    from rlhf_cli.stages.reward_model.quality import (
        curve_json,
        doubts,
        members_json,
        quality_metrics,
        quality_summary,
        write_quality,
    )

    scale = fmean(member.mean for member in members), fmean(member.std for member in members)
    held_out = [on_scale(member.held_out, (member.mean, member.std), scale) for member in members]
    checked = [on_scale(member.checked, (member.mean, member.std), scale) for member in members]
    report = ranking_report(plan.held_out, mean_rewards(held_out))
    train_accuracy = accuracy(plan.checked, mean_rewards(checked))
    metrics = quality_metrics(report, train_accuracy, *scale) | members[0].metrics
    more: dict[str, Any] = {}
    if len(members) > 1:
        first = [reward for ranking in on_scale(held_out[0], scale, (0.0, 1.0)) for reward in ranking]
        metrics |= {"rm/lowest": min(first), "rm/highest": max(first)}  # PPO watches the first member alone
        more = members_json(plan.held_out, held_out)
        metrics["rm/disagreement"] = more["disagreement"]["value"]
    if curve:
        whole = curve | {1.0: report.accuracy}
        more["data_curve"] = curve_json(whole, {share: len(plan.part(share)) for share in whole})
        metrics |= {f"rm/accuracy_data_{share:g}": measured.value for share, measured in curve.items()}
    write_quality(report, context.output, more)
    if text := doubts(report):
        warn(text)
    return metrics, quality_summary(report, train_accuracy)


def on_scale(
    rewards: Sequence[Sequence[float]], own: tuple[float, float], other: tuple[float, float]
) -> list[list[float]]:
    """Return rewards of one (mean, standard deviation) on the scale of another, by ranking.

    PPO combines normalized rewards, so members with a larger spread must not count more.
    """
    (mean, std), (new_mean, new_std) = own, other
    return [[new_mean + new_std * (reward - mean) / std for reward in ranking] for ranking in rewards]


def mean_rewards(members: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Return the mean over members of the reward of each completion, by ranking."""
    return [[fmean(rewards) for rewards in zip(*ranking, strict=True)] for ranking in zip(*members, strict=True)]


def _member(
    context: RewardModelContext, plan: Plan, number: int, reward_model: RewardModel, generator: Generator | None
) -> Member:
    """Train, measure, normalize and write a member; one that an earlier attempt finished is only measured again."""
    from rlhf_cli.memory import free_memory
    from rlhf_cli.models.reward_model.verification import probe_texts, save_trained_reward_model
    from rlhf_cli.models.sharding import is_sharded
    from rlhf_cli.stages.reward_model.evaluation import ranking_rewards
    from rlhf_cli.training.monitoring.run_logger import METRICS, TIMING
    from rlhf_cli.training.monitoring.timing_log import append_evaluation

    settings, processes = context.settings, plan.processes
    work, folder = member_folder(context.work, number), member_folder(context.output, number)
    if number > 1:
        say(f"reward model: member {number} of {settings.members}")
    trainer = _trained(context, plan, reward_model, plan.train, number, work)
    metrics = {"rm/skipped_steps": float(trainer.loop.state.skipped_steps)}
    if trainer.best.found is not None:
        metrics["rm/best_step"] = float(trainer.best.found.step)
    steps, watch = trainer.batches.steps, trainer.loop.watch
    del trainer  # with the moments of its optimizer
    free_memory()
    with watch.phase("eval", "evaluating"):
        held_out = ranking_rewards(context, reward_model, plan.held_out, "scoring held-out rankings", processes)
        checked = _checked_and_normalized(context, plan, reward_model, generator)
    if processes.is_main:
        append_evaluation(work, steps, watch.end_step())
        folder.mkdir(parents=True, exist_ok=True)
    if processes.is_main or is_sharded(reward_model.model):
        texts = [(one.prompt, text) for one in plan.held_out[:PROMPTS_CHECKED] for text in one.completions]
        probe = probe_texts(reward_model, texts)
        depth = 1 if number == 1 else MEMBER_DEPTH
        metrics["rm/written_difference"] = save_trained_reward_model(reward_model, folder, probe=probe, depth=depth)
    if processes.is_main:
        for name in (METRICS, TIMING):
            shutil.copyfile(work / name, folder / name)
    return Member(held_out, checked, reward_model.mean, reward_model.std, metrics)


def _checked_and_normalized(
    context: RewardModelContext, plan: Plan, reward_model: RewardModel, generator: Generator | None
) -> list[list[float]]:
    """Return the raw rewards of the training rankings to check, after normalizing rewards if the recipe says so.

    Up to a number of training rankings, both are about all of them, which are then scored once.
    """
    from rlhf_cli.stages.reward_model.evaluation import ranking_rewards
    from rlhf_cli.stages.reward_model.normalization import normalize, normalized_over

    chosen = normalized_over(context, plan.train) if context.settings.normalize else []
    is_same = {id(ranking) for ranking in chosen} == {id(ranking) for ranking in plan.checked}
    rankings = chosen if is_same else plan.checked
    rewards = ranking_rewards(context, reward_model, rankings, "scoring training rankings", plan.processes)
    if chosen:
        scored = rewards if is_same else None
        normalize(context, reward_model, chosen, plan.style, plan.processes, generator, scored)
    of_ranking = {id(ranking): found for ranking, found in zip(rankings, rewards, strict=True)}
    return [of_ranking[id(ranking)] for ranking in plan.checked]


def _trained(
    context: RewardModelContext,
    plan: Plan,
    reward_model: RewardModel,
    rankings: Sequence[Ranking],
    number: int,
    work: Path,
) -> RewardTrainer:
    """Train a reward model on rankings, with the seed of member `number` and checkpoints in `work`."""
    from rlhf_cli.stages.reward_model.trainer import RewardTrainer
    from rlhf_cli.training.flops import device_peak
    from rlhf_cli.training.monitoring.metrics_log import MetricsLog

    work.mkdir(parents=True, exist_ok=True)
    trainer = RewardTrainer(
        reward_model,
        [plan.groups[id(ranking)] for ranking in rankings],
        context.settings,
        held_out=[plan.groups[id(ranking)] for ranking in plan.watched],
        seed=member_seed(context, number),
        work=work,
        stop=context.stop,
        processes=plan.processes,
        log=metrics_log(context) if work == context.work else MetricsLog,  # trackers show one training
        peak=device_peak(plan.source.device, plan.source.precision, plan.processes),
        checkpoint_async=context.recipe.checkpoint_async,
    )
    trainer.train()
    return trainer


def _data_curve(context: RewardModelContext, plan: Plan) -> dict[float, Measured]:
    """Return the held-out accuracy of reward models trained on shares of the prompts, which are not written."""
    from rlhf_cli.memory import free_memory
    from rlhf_cli.stages.reward_model.evaluation import ranking_report, ranking_rewards

    found: dict[float, Measured] = {}
    for share in context.settings.data_curve:
        rankings = plan.part(share)
        say(f"reward model: {share:g} of the training prompts ({len(rankings):,} rankings), for the data-size curve")
        reward_model = new_member(context, plan.source, plan.style, 1)
        _trained(context, plan, reward_model, rankings, 1, context.work / f"data-{share:g}")
        label = "scoring held-out rankings"
        rewards = ranking_rewards(context, reward_model, plan.held_out, label, plan.processes)
        found[share] = ranking_report(plan.held_out, rewards).accuracy
        del reward_model
        free_memory()
    return found
