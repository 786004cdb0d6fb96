"""The `ppo` stage: from the recipe's section and the artifacts before it to a trained policy."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.data.records import prompt_key
from rlhf_cli.distributed.ranks import is_main
from rlhf_cli.errors import DetectorStopError, UsageError
from rlhf_cli.files import link_or_copy
from rlhf_cli.generation.prompts import PromptStyle, prompt_style, text_template
from rlhf_cli.models.reward_model.members import further_members
from rlhf_cli.progress import say, say_once
from rlhf_cli.stages.base import StageOutcome
from rlhf_cli.stages.common import (
    CHOSEN_ON,
    load_policy,
    metrics_log,
    model_source,
    stage_sampling,
    warn_of_rounding,
    write_contract,
)
from rlhf_cli.stages.generation import choose_generator
from rlhf_cli.stages.inputs import source_of
from rlhf_cli.stages.ppo.data import load_data
from rlhf_cli.stages.ppo.stage import PPOContext
from rlhf_cli.stages.precision import decide_precision
from rlhf_cli.stages.sharding import require_processes

if TYPE_CHECKING:
    from rlhf_cli.data.examples import Example
    from rlhf_cli.data.skips import SkipLog
    from rlhf_cli.distributed.process_group import ProcessGroup
    from rlhf_cli.generation.generator import Generator
    from rlhf_cli.generation.policy import Policy
    from rlhf_cli.generation.sampling import Sampling
    from rlhf_cli.models.loading import ModelSource
    from rlhf_cli.rewards.ensemble import CombinedReward
    from rlhf_cli.stages.ppo.data import PPOData
    from rlhf_cli.stages.ppo.forward_passes import ForwardPasses
    from rlhf_cli.stages.ppo.model_loading import RewardModelHandle
    from rlhf_cli.stages.ppo.models import PPOModels
    from rlhf_cli.stages.ppo.settings import PPOSettings
    from rlhf_cli.stages.ppo.trainer import PPOTrainer
    from rlhf_cli.training.monitoring.detectors.detectors import Rewards


_FEWEST_ROWS = 2
"""Two points do not make a curve."""


def run(context: PPOContext, generator: Generator | None = None) -> StageOutcome:
    """Train the policy against the reward; write it merged, with its critic, its metrics and a health report.

    Args:
        context: of the stage.
        generator: draws completions from the policy; None is that of `generation.engine`.
    """
    from rlhf_cli.distributed.process_group import ProcessGroup
    from rlhf_cli.generation.torch_generator import TorchGenerator
    from rlhf_cli.memory import free_memory
    from rlhf_cli.models.loading import load_tokenizer
    from rlhf_cli.stages.ppo.model_saving import STEPS, StepPolicies, sample_probe
    from rlhf_cli.stages.ppo.rollout import own_sampling
    from rlhf_cli.stages.ppo.trainer import PPOTrainer
    from rlhf_cli.training.flops import device_peak
    from rlhf_cli.training.monitoring.detectors.detectors import Detectors

    require_processes(context.recipe)
    context = decide_precision(context)
    settings, is_sharded = context.settings, context.recipe.model.sharding != "none"
    start = context.inputs.policy.source
    source = model_source(context.recipe, start)
    sampling = stage_sampling(context, own_sampling(settings), start)
    style = prompt_style(context.recipe.data, start, load_tokenizer(source))
    # Data is read first: what is wrong with it is said before models are loaded, whose weights the policy then uses.
    policy = load_policy(context, start, sampling, style=style, weights=lambda: models.policy())
    data, skips = load_data(context, policy)
    warn_of_rounding(context, source)
    models, reward_model = _load_models(context, settings, source, sampling, is_sharded=is_sharded)
    _check_reference(models, policy)
    _say_if_prompted_otherwise(reward_model, style)
    processes = ProcessGroup(source.device)
    reward = _build_rewards(context, policy, reward_model, is_sharded=is_sharded)
    steps = StepPolicies(
        models, source, settings, context.work / STEPS, sampling, policy.stop_ids,
        lambda folder: _write_contract(context, folder, style, sampling, data),
    )  # fmt: skip
    generator = choose_generator(context, [policy], generator)
    # A sharded policy that vLLM draws from is never whole in a process but in vLLM.
    prober = generator if is_sharded else TorchGenerator()
    trainer = PPOTrainer(
        models,
        _forward_passes(models, settings, policy, processes),
        data,
        reward.score,
        settings,
        policy=policy,
        generator=generator,
        detectors=Detectors(settings.detectors, _watched(context, reward, data)),
        seed=context.recipe.seed,
        work=context.work,
        stop=context.stop,
        log=metrics_log(context),
        save_policy=lambda step: steps.save(step, sample_probe(policy, data.prompts, prober)),
        peak=device_peak(source.device, source.precision, processes),
        checkpoint_async=context.recipe.checkpoint_async,
    )
    _train(trainer, context.work, processes)
    del trainer  # with the moments of its optimizer: what follows loads what was written
    free_memory()
    probe = sample_probe(policy, data.prompts, prober) if is_sharded or processes.is_main else []
    writes = is_sharded or processes.is_main
    return _written(context, models, policy, style, data, skips, probe) if writes else StageOutcome()


def _forward_passes(models: PPOModels, settings: PPOSettings, policy: Policy, processes: ProcessGroup) -> ForwardPasses:
    from rlhf_cli.stages.ppo.forward_passes import ForwardPasses

    return ForwardPasses(
        models,
        autocast=policy.autocast,
        micro_batch_size=settings.micro_batch_size,
        micro_batch_tokens=settings.micro_batch_tokens,
        temperature=policy.sampling.temperature,
        trains_entropy=settings.entropy_coef != 0,
        processes=processes,
    )


def _written(
    context: PPOContext,
    models: PPOModels,
    policy: Policy,
    style: PromptStyle,
    data: PPOData,
    skips: SkipLog,
    probe: list[Example],
) -> StageOutcome:
    """Write the artifact, and return what the stage came to; of sharded models every process calls this."""
    from rlhf_cli.stages.ppo.model_saving import save_ppo_models
    from rlhf_cli.training.checkpoint.store import remove_all_but_newest
    from rlhf_cli.training.monitoring.timing_log import read_totals

    written_kl = save_ppo_models(
        models,
        policy.source,
        context.settings,
        context.output,
        probe=probe,
        sampling=policy.sampling,
        stop_ids=policy.stop_ids,
    )
    if not is_main():
        return StageOutcome()
    _write_contract(context, context.output, style, policy.sampling, data)
    if skips.total:
        skips.write(context.output / "skips.jsonl")
    rows = _keep_records(context, data)
    remove_all_but_newest(context.work)
    return _outcome(rows, dict(skips.counts), written_kl, read_totals(context.work))


def _write_contract(context: PPOContext, folder: Path, style: PromptStyle, sampling: Sampling, data: PPOData) -> None:
    """Write the contract of a policy that this stage trained to its folder."""
    start = context.inputs.policy.source
    of_folder = dataclasses.replace(context, output=folder)
    write_contract(of_folder, start, style, sampling.settings(), data.records, samples_in_training=True)


def _check_reference(models: PPOModels, policy: Policy) -> None:
    """Check that the model to start from can be sampled from and scored, see `check_decoding`."""
    import torch

    from rlhf_cli.generation.decoding import check_decoding
    from rlhf_cli.models.sharding import computing

    with models.reference() as model, policy.autocast(), torch.no_grad():
        computing(model, lambda: check_decoding(model, policy.source.path))


def _build_rewards(
    context: PPOContext, policy: Policy, reward_model: RewardModelHandle | None, *, is_sharded: bool
) -> CombinedReward:
    """Return the reward of the recipe, with all members of an ensemble, and say what it is."""
    from rlhf_cli.stages.ppo.rewards import build_rewards

    path = source_of(context.inputs.reward_model)
    members = [] if path is None else further_members(policy.source.at(path).folder)
    reward = build_rewards(
        context.settings, reward_model, policy.source, policy.format.template, members=members, stop=context.stop,
        is_sharded=is_sharded,
    )  # fmt: skip
    say(f"ppo: the reward is {reward.described()}")
    return reward


def _watched(context: PPOContext, reward: CombinedReward, data: PPOData) -> Rewards:
    """Return what the detectors know of the rewards."""
    from rlhf_cli.stages.ppo.detection import watched_rewards

    return watched_rewards(
        context.settings,
        reward.weights,
        reward_model=source_of(context.inputs.reward_model),
        held_out=0 if data.held_out is None else len(data.held_out),
    )


def _train(trainer: PPOTrainer, work: Path, processes: ProcessGroup) -> None:
    """Train; where a detector stops the run, say what its metrics look like."""
    try:
        trainer.train()
    except DetectorStopError:
        if processes.is_main:
            _judge(work, work)
        raise


def _say_if_prompted_otherwise(reward_model: RewardModelHandle | None, style: PromptStyle) -> None:
    """Say where the reward model reads plain-text prompts in another way than the policy."""
    if reward_model is not None:
        own = PromptStyle.of(reward_model.model.format)
        if own != style:
            say(f"ppo: the policy is prompted {style}, the reward model {own}")


def _load_models(
    context: PPOContext, settings: PPOSettings, source: ModelSource, sampling: Sampling, *, is_sharded: bool = False
) -> tuple[PPOModels, RewardModelHandle | None]:
    from rlhf_cli.models.loading import context_length, load_config
    from rlhf_cli.stages.ppo.model_loading import load_ppo_models

    reward_path = source_of(context.inputs.reward_model)
    if reward_path is None and not settings.rewards:
        raise UsageError(
            "`ppo` has no reward: no reward model and no function",
            hint="name one with `--set ppo.reward_model=PATH`, or give `ppo.rewards`",
        )
    if context.inputs.critic is not None:
        settings = settings.model_copy(update={"critic_from": context.inputs.critic.source})
    longest = min(context_length(load_config(source)), context.recipe.data.max_prompt_tokens + sampling.max_new_tokens)
    source = dataclasses.replace(source, quantize=context.recipe.model.quantize)
    loaded = load_ppo_models(
        source,
        settings,
        reward_path=reward_path,
        template=text_template(context.recipe.data, source.path),
        seed=context.recipe.seed,
        longest=longest,
        scratch=context.work,
        is_sharded=is_sharded,
    )
    for note in loaded.notes:
        say_once(f"ppo: {note}")
    return loaded.models, loaded.reward_model


def _keep_records(context: PPOContext, data: PPOData) -> list[dict[str, Any]]:
    """Put beside the policy what the run wrote as it went, and what that looks like; return the rows of its metrics.

    These are the policies of `save_steps`, metrics, samples, a picture, and whether the curve is normal.
    """
    from rlhf_cli.stages.ppo.model_saving import STEPS, saved_steps
    from rlhf_cli.training.monitoring.metrics_log import read_rows
    from rlhf_cli.training.monitoring.plots import draw_curves
    from rlhf_cli.training.monitoring.run_logger import DETECTIONS, METRICS, SAMPLES, TIMING

    settings, rows = context.settings, read_rows(context.work / METRICS)
    # Linked, not moved: a kill before the artifact is in place must not lose them.
    for folder in saved_steps(context.work / STEPS, up_to=rows[-1]["step"] if rows else 0):
        shutil.copytree(folder, context.output / STEPS / folder.name, copy_function=link_or_copy)
    if settings.kl_budget is not None and data.held_out is not None:
        keys = [prompt_key(prompt) for prompt in data.held_out.first(settings.eval_prompts).prompts]
        (context.output / CHOSEN_ON).write_text(json.dumps(keys), encoding="utf-8")
    for name in (METRICS, TIMING, SAMPLES, DETECTIONS):
        if (context.work / name).is_file():
            shutil.copyfile(context.work / name, context.output / name)
    if len(rows) > _FEWEST_ROWS:
        draw_curves(rows, context.output / "curves.png", title=f"{context.recipe.name}: PPO")
    _judge(context.work, context.output)
    return rows


def _judge(work: Path, folder: Path) -> None:
    """Say whether the curve is normal, and write it to `health.json` in a folder."""
    from rlhf_cli.training.monitoring.health import report as health
    from rlhf_cli.training.monitoring.metrics_log import read_rows
    from rlhf_cli.training.monitoring.run_logger import DETECTIONS, METRICS

    findings = health.judge(read_rows(work / METRICS), read_rows(work / DETECTIONS))
    health.write(folder / "health.json", findings)
    health.show(findings)


def _outcome(
    rows: list[dict[str, Any]], skipped: dict[str, int], written_kl: float, timing: dict[str, float]
) -> StageOutcome:
    """First and last tenth of the run, since a single step's mean is noisy."""
    steps = [row for row in rows if row["step"] > 0]
    width = max(1, len(steps) // 10)

    def mean(name: str, chosen: list[dict[str, Any]]) -> float:
        """Over the steps that have the figure: broken steps have none."""
        found = [row[name] for row in chosen if row.get(name) is not None]
        return sum(found) / len(found) if found else math.nan

    first, last = steps[:width], steps[-width:]
    names = ("objective/kl", "objective/entropy", "length/mean", "policy/clipfrac_avg", "val/explained_variance")
    metrics = {
        "objective/scores_first": mean("objective/scores", first),
        "objective/scores": mean("objective/scores", last),
        **{name: mean(name, last) for name in names},
        "episode": steps[-1]["episode"] if steps else math.nan,
        "written_kl": written_kl,
    }
    summary = [
        ("reward", f"{metrics['objective/scores_first']:.2f} -> {metrics['objective/scores']:.2f}"),
        ("KL", f"{metrics['objective/kl']:z.1f} nats per completion"),
        ("completions", f"{metrics['episode']:,.0f}"),
    ]
    evaluated = [row for row in rows if row.get("eval/objective/scores") is not None]
    if evaluated:
        metrics["eval/objective/scores"] = evaluated[-1]["eval/objective/scores"]
        first_score, last_score = (row["eval/objective/scores"] for row in (evaluated[0], evaluated[-1]))
        summary.insert(1, ("held-out reward", f"{first_score:.2f} -> {last_score:.2f}"))
    return StageOutcome(metrics=metrics, skipped=skipped, summary=summary, timing=timing)
