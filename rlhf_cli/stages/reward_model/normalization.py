"""Normalization of a reward model: mean and deviation of its rewards over completions like those it will score."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev

from rlhf_cli.data.records import Prompt, Ranking, seed_for
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.generation.generator import Generator, Request
from rlhf_cli.generation.progress import Drawing
from rlhf_cli.generation.prompts import PromptStyle
from rlhf_cli.generation.weights_to_draw import weights_to_draw
from rlhf_cli.models.loading import context_length, load_config
from rlhf_cli.models.reward_model.classifier import is_classifier
from rlhf_cli.models.reward_model.model import RewardModel
from rlhf_cli.progress import say, task
from rlhf_cli.settings.run import artifact_settings
from rlhf_cli.settings.shared import SamplingSettings
from rlhf_cli.stages.common import load_policy, model_source, stage_sampling
from rlhf_cli.stages.generation import choose_generator
from rlhf_cli.stages.reward_model.evaluation import ranking_rewards
from rlhf_cli.stages.reward_model.settings import NORMALIZED_OVER
from rlhf_cli.stages.reward_model.stage import RewardModelContext


def normalized_over(context: RewardModelContext, train: Sequence[Ranking]) -> list[Ranking]:
    """Return the training rankings whose prompts rewards are normalized over."""
    return random.Random(context.recipe.seed + 1).sample(list(train), min(len(train), NORMALIZED_OVER))


def normalize(
    context: RewardModelContext,
    reward_model: RewardModel,
    chosen: Sequence[Ranking],
    style: PromptStyle,
    processes: ProcessGroup,
    generator: Generator | None = None,
    scored: Sequence[Sequence[float]] | None = None,
) -> None:
    """Set `mean` and `std` of the reward model over completions of the SFT model to training prompts.

    If `label` sampled the ranked completions, they are the SFT model's own and serve as they are. If they were
    imported, the SFT model completes some training prompts anew. An encoder or a classifier cannot write: then the
    imported completions serve.

    Args:
        context: of the stage.
        reward_model: trained; its `mean` and `std` are set.
        chosen: see `normalized_over`.
        style: how the SFT model is prompted.
        processes: of the run, which share the work.
        generator: draws new completions; None is that of `generation.engine`.
        scored: rewards of the completions of `chosen`, before normalization; None scores them where they are needed.
    """
    sampled = (
        _sample(context, reward_model, chosen, style, processes, generator)
        if samples_anew(context, reward_model)
        else None
    )
    if sampled is not None:
        raw = reward_model.score([prompt for prompt, _ in sampled], [text for _, text in sampled])
    else:
        groups = scored or ranking_rewards(context, reward_model, chosen, "normalizing rewards", processes)
        raw = [reward for rewards in groups for reward in rewards]
    # Equal rewards have no deviation to divide by.
    reward_model.mean, reward_model.std = fmean(raw), pstdev(raw) or 1.0
    kind = "labeled completions" if sampled is None else "new completions of the SFT model"
    say(
        f"rewards are normalized over {len(raw):,} {kind}: mean {reward_model.mean:.3f}, "
        f"deviation {reward_model.std:.3f}"
    )


def samples_anew(context: RewardModelContext, reward_model: RewardModel) -> bool:
    """Return whether the SFT model completes prompts to normalize over: it can write and did not write the labeled."""
    if _labels_are_sampled(context) or reward_model.is_encoder:
        return False
    return not is_classifier(load_config(model_source(context.recipe, context.inputs.policy.source)))


def _labels_are_sampled(context: RewardModelContext) -> bool:
    """Return whether `label` sampled the ranked completions from the SFT model."""
    rankings = context.inputs.rankings
    if rankings.upstream is None:
        return False
    label = artifact_settings(Path(rankings.source).parent).get("label", {})
    return label.get("by") != "import" and label.get("items") is None


def _sample(
    context: RewardModelContext,
    reward_model: RewardModel,
    rankings: Sequence[Ranking],
    style: PromptStyle,
    processes: ProcessGroup,
    generator: Generator | None,
) -> list[tuple[Prompt, str]] | None:
    """Complete the prompts of `rankings` that fit the SFT model; None if none fits."""
    path = context.inputs.policy.source
    sampling = stage_sampling(context, SamplingSettings(), path)
    # Half of the context is left to prompts: an error here would lose the training.
    longest = context_length(load_config(model_source(context.recipe, path))) // 2
    sampling = dataclasses.replace(sampling, max_new_tokens=max(1, min(sampling.max_new_tokens, longest)))
    policy = load_policy(context, path, sampling, style=style, quantized=True)
    max_length = policy.longest_prompt("sampling.max_new_tokens")
    prompts = [ranking.prompt for ranking in rankings]
    fitting = [prompt for prompt in prompts if len(policy.prompt_ids(prompt)) <= max_length]
    if not fitting:
        return None
    draws = choose_generator(context, [policy], generator)

    def complete(own: list[Prompt]) -> list[str]:
        requests = [Request(policy.prompt_ids(prompt), seed_for(prompt, context.recipe.seed, 0)) for prompt in own]
        with task("completions to normalize rewards", len(fitting), "completions", share=len(own)) as bar:
            progress = Drawing(len(own), sampling.max_new_tokens, bar)
            with weights_to_draw(policy, draws):
                drawn = draws.generate(policy, requests, progress=progress, stop=context.stop.check)
        return [completion.text for completion in drawn]

    texts = processes.map(fitting, complete)
    policy.release()
    return list(zip(fitting, texts, strict=True))
