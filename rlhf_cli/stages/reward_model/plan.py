"""What reward models are trained from: the rankings that were read, checked, encoded and divided."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.data.records import split_key
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DataError
from rlhf_cli.generation.contract import read_contract
from rlhf_cli.generation.prompts import PromptStyle, prompt_style, token_ids
from rlhf_cli.progress import task, warn
from rlhf_cli.stages.common import inherited_sampling, model_source, split_from, warn_of_rounding, warn_of_trained
from rlhf_cli.stages.reward_model.stage import RewardModelContext

if TYPE_CHECKING:
    from rlhf_cli.data.records import Ranking
    from rlhf_cli.data.sources import LoadedRecords
    from rlhf_cli.models.loading import ModelSource
    from rlhf_cli.models.reward_model.model import RewardModel
    from rlhf_cli.settings.shared import SamplingSettings
    from rlhf_cli.stages.reward_model.data import RankedGroup
    from rlhf_cli.stages.reward_model.settings import RewardModelSettings

PROMPTS_CHECKED = 64
"""Training prompts whose accuracy is reported beside the held-out accuracy, and held-out ones that the written model is
compared on."""

_SEEDS_APART = 1_000_003
"""Difference of the seeds of two members, so that runs with seeds 0, 1, 2 share none of them."""


NewMember = Callable[["RewardModelContext", "ModelSource", PromptStyle, int], "RewardModel"]
"""(context, model to start from, how prompts are written, 1-based number) -> a member before its training."""


@dataclass(frozen=True)
class Plan:
    """What all members of an ensemble are trained from; without an ensemble there is one.

    Attributes:
        source: the model to start from.
        style: how prompts are written.
        sampling: with which completions were drawn, for the contract.
        loaded: the rankings that were read, with what was skipped.
        groups: identity of a ranking -> its encoded group.
        train: rankings to train on.
        checked: some of them, whose accuracy is reported.
        watched: held-out rankings to evaluate on while training.
        held_out: those that the finished reward model is measured on.
        processes: of the run.
    """

    source: ModelSource
    style: PromptStyle
    sampling: SamplingSettings
    loaded: LoadedRecords
    groups: dict[int, RankedGroup]
    train: list[Ranking]
    checked: list[Ranking]
    watched: list[Ranking]
    held_out: list[Ranking]
    processes: ProcessGroup

    def part(self, share: float) -> list[Ranking]:
        """Return the training rankings of a share of the prompts, at least one; larger shares contain smaller ones."""
        keys = sorted({split_key(ranking.prompt) for ranking in self.train})
        kept = frozenset(keys[: max(1, round(share * len(keys)))])
        return [ranking for ranking in self.train if split_key(ranking.prompt) in kept]


def make_plan(context: RewardModelContext, new: NewMember | None = None) -> tuple[Plan, RewardModel]:
    """Read, check, encode and divide the rankings; also returns the first member, not trained yet.

    Args:
        context: of the stage.
        new: makes that member; None is `new_member`.
    """
    from rlhf_cli.data.template_checks import check_records
    from rlhf_cli.models.loading import load_tokenizer
    from rlhf_cli.stages.reward_model.evaluation import check_has_preference

    recipe, settings = context.recipe, context.settings
    loaded = _rankings(context, settings)
    start = context.inputs.policy.source
    source = model_source(recipe, start, quantized=True)
    style = prompt_style(recipe.data, start, load_tokenizer(source))
    _say_if_labeled_otherwise(context, style)
    warn_of_rounding(context, source)
    first = (new or new_member)(context, source, style, 1)
    check_records(first.format, loaded.records)
    sampling = inherited_sampling(recipe, start)
    if not first.is_encoder:  # completions may be drawn after training, and a wrong token must not end that
        token_ids(sampling.stop_tokens or (), first.format)
    rankings, groups = _fitting(context, settings, first, loaded)
    split = split_from(context, start)
    train, held_out = split.divide(rankings)
    if not held_out:
        raise DataError(
            f"{context.inputs.rankings.source}: none of its {len(rankings):,} rankings has a held-out prompt "
            f"(`data.holdout: {split.holdout:g}`), so nothing could say how good the reward model is",
            hint="give more prompts, or hold out more with `--set data.holdout=0.2`",
        )
    warn_of_trained(held_out, start, "its accuracy on them")
    watched, held_out = _watched(settings, held_out)
    check_has_preference(held_out)
    checked = random.Random(recipe.seed).sample(list(train), min(len(train), PROMPTS_CHECKED))
    processes = ProcessGroup(source.device)
    return Plan(source, style, sampling, loaded, groups, train, checked, watched, held_out, processes), first


def member_seed(context: RewardModelContext, number: int) -> int:
    """Seed of a member: of its head, its adapter and the order of its data. The first has that of the recipe."""
    return (context.recipe.seed + _SEEDS_APART * (number - 1)) % 2**32


def new_member(context: RewardModelContext, source: ModelSource, style: PromptStyle, number: int) -> RewardModel:
    """Return member `number` before its training, sharded if the recipe says so."""
    from rlhf_cli.models.reward_model.loading import new_reward_model
    from rlhf_cli.models.reward_model.sharded import new_sharded_reward_model

    settings = context.settings
    is_whole = context.recipe.model.sharding == "none"
    return (new_reward_model if is_whole else new_sharded_reward_model)(
        source,
        template=style.template,
        template_kwargs=style.kwargs,
        lora=settings.lora if settings.adapter == "lora" else None,
        seed=member_seed(context, number),
        gradient_checkpointing=settings.gradient_checkpointing,
    )


def member_without_weights(
    context: RewardModelContext, source: ModelSource, style: PromptStyle, number: int
) -> RewardModel:
    """Return a member that encodes text as `new_member`'s does, and cannot compute: to count tokens before a run."""
    from rlhf_cli.models.loading import load_config
    from rlhf_cli.models.reward_model.classifier import check_reward_config, classifier_class
    from rlhf_cli.models.reward_model.loading import reward_format
    from rlhf_cli.models.reward_model.model import RewardModel
    from rlhf_cli.models.weight_loading import empty_model

    config = load_config(source)
    is_encoder = check_reward_config(config, source.path)
    config.num_labels = 1
    model = empty_model(classifier_class(config, source.path), source, config)
    own = reward_format(source, style.template, is_encoder=is_encoder, template_kwargs=style.kwargs)
    return RewardModel(model, own, source, is_encoder=is_encoder)


def _watched(settings: RewardModelSettings, held_out: list[Ranking]) -> tuple[list[Ranking], list[Ranking]]:
    """Return the rankings to evaluate on while training, and those that the finished model is measured on.

    Where the first choose the weights, no prompt is among both: the best of many evaluations looks better than it is.
    """
    from rlhf_cli.stages.reward_model.data import halves

    if settings.eval_steps is None:
        return [], held_out
    if not settings.chooses:
        return held_out, held_out
    watched, measured = halves(held_out)
    if not measured:
        raise DataError(
            "`train_rm.keep_best` needs two held-out prompts or more: one half chooses the weights, the other measures "
            "them; there is 1",
            hint="give more prompts, hold out more with `--set data.holdout=0.2`, or set `train_rm.keep_best: none`",
        )
    return watched, measured


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
    mapping: dict[str, Any] = {} if is_ours else {"columns": data.columns, "comparison": data.comparison}
    loaded = read_records(
        context.inputs.rankings.source, "ranking", max_skip=data.max_skip, keep_blank=is_ours, **mapping
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
    with task("tokenizing rankings", len(loaded.records), "prompts", saves=False) as bar:
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
