"""The work of `train-rm`, for `rlhf plan`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.generation.prompts import prompt_style
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.model_shape import FLOAT32
from rlhf_cli.stages.common import inherited_sampling, model_source
from rlhf_cli.stages.inputs import Input
from rlhf_cli.stages.reward_model.settings import NORMALIZED_OVER
from rlhf_cli.stages.reward_model.stage import RewardModelContext
from rlhf_cli.stages.workload import (
    Passed,
    Reading,
    Sequences,
    Work,
    Workload,
    comparing,
    count_passes,
    drawing,
    reads_shared_prompts,
    scoring,
    spread,
)

if TYPE_CHECKING:
    from rlhf_cli.data.records import Ranking
    from rlhf_cli.models.loading import ModelSource
    from rlhf_cli.stages.reward_model.data import RankedGroup
    from rlhf_cli.stages.reward_model.settings import RewardModelSettings


@dataclass(frozen=True)
class _Counted:
    """What a stage passes over.

    Attributes:
        passed: training passes.
        steps: optimizer steps.
        records: training rankings.
        scored: tokens of all passes without a gradient over rankings.
        drawn_for: tokens of each prompt that the SFT model completes to normalize rewards.
    """

    passed: Passed
    steps: int
    records: int
    scored: float
    drawn_for: list[int] = field(default_factory=list)


def read(context: RewardModelContext) -> Reading | None:
    """Read the rankings as the stage does; those that `label` has still to make are counted from its prompts.

    None for completions of the user that `label` has still to rank.
    """
    recipe, rankings = context.recipe, context.inputs.rankings
    if rankings.upstream is None or Path(rankings.source).is_file():
        return _of_rankings(context)
    if recipe.value("label.items") is not None:
        return None
    if (imported := recipe.value("label.data")) is not None:
        given = Input("data", imported, "label.data", records="ranking")
        settings = context.settings.model_copy(update={"data": imported})
        return _of_rankings(replace(context, settings=settings, inputs=replace(context.inputs, rankings=given)))
    return _of_labels_to_come(context)


def _of_rankings(context: RewardModelContext) -> Reading:
    from rlhf_cli.models.loading import load_config
    from rlhf_cli.stages.reward_model.normalization import samples_anew
    from rlhf_cli.stages.reward_model.plan import make_plan, member_without_weights

    recipe, settings = context.recipe, context.settings
    plan, member = make_plan(context, member_without_weights)
    config = load_config(plan.source)
    is_grouped = reads_shared_prompts(recipe.model, is_encoder_decoder=config.is_encoder_decoder)
    groups = [plan.groups[id(ranking)] for ranking in plan.train]
    passed, steps = _passes(settings, groups, seed=recipe.seed, is_grouped=is_grouped)

    def tokens(rankings: Sequence[Ranking]) -> float:
        return sum(_tokens(plan.groups[id(one)], is_grouped=is_grouped) for one in rankings)

    is_drawn = settings.normalize and samples_anew(context, member)
    # Rewards are normalized over as many rankings as are checked. Where these are all, they are scored once.
    normalized = 0 if is_drawn or not settings.normalize or len(plan.checked) == len(groups) else tokens(plan.checked)
    scored = tokens(plan.held_out) + tokens(plan.checked) + normalized
    scored += _evaluations(settings, steps) * tokens(plan.watched) + _before_steps(settings, passed)
    drawn_for = [_shared(group) for group in groups[:NORMALIZED_OVER]] if is_drawn else []
    ordered = sorted(groups, key=lambda group: group.longest)
    chosen = [ordered[number] for number in spread(len(ordered), settings.micro_batch_size)]
    return _reading(
        context,
        plan.source,
        lambda mean: _Counted(passed, steps, len(groups), scored, drawn_for),
        sample=[(one.ids[: _shared(group)], one.ids[_shared(group) :]) for group in chosen for one in group.sequences],
        rows=settings.micro_batch_size * len(ordered[0].sequences),
        draws=bool(drawn_for),
    )


def _of_labels_to_come(context: RewardModelContext) -> Reading:
    from rlhf_cli.data.sources import read_records
    from rlhf_cli.models.loading import load_tokenizer
    from rlhf_cli.stages.common import split_from
    from rlhf_cli.stages.reward_model.plan import PROMPTS_CHECKED, member_without_weights

    recipe, settings, start = context.recipe, context.settings, context.inputs.policy.source
    source = model_source(recipe, start, quantized=True)
    member = member_without_weights(context, source, prompt_style(recipe.data, start, load_tokenizer(source)), 1)
    prompts = recipe.value("label.prompts") or recipe.data.prompts
    assert prompts is not None  # `label` checks it
    loaded = read_records(prompts, "prompt", columns=recipe.data.columns, max_skip=recipe.data.max_skip)
    distinct = {str(record.prompt): record for record in loaded.records}.values()
    train, held_out = split_from(context, start).divide(distinct)
    lengths = [len(member.encode(record.prompt, "")) for record in train]
    count = recipe.value("label.completions_per_prompt")
    longest = recipe.value("label.sampling.max_new_tokens") or _longest(context)
    steps_per_epoch = math.ceil(len(train) / settings.batch_size)
    steps = max(1, round(settings.epochs * steps_per_epoch))
    share = steps / steps_per_epoch

    def at(mean: float | None) -> _Counted:
        each = mean or longest
        most = sorted(lengths)[-settings.micro_batch_size :]
        passed = Passed(
            tokens=share * sum(one + count * each for one in lengths),
            pairs=share * count * sum((one + each) ** 2 for one in lengths),
            largest=round(sum(one + count * longest for one in most)),
            parts=share * math.ceil(len(lengths) / settings.micro_batch_size),
        )
        checked = min(PROMPTS_CHECKED, len(train))
        watched = len(held_out) // 2 if settings.chooses else len(held_out)
        rankings = len(held_out) - (watched if settings.chooses else 0) + checked
        rankings += checked if settings.normalize and checked < len(train) else 0
        rankings += _evaluations(settings, steps) * watched
        scored = rankings * (sum(lengths) / len(lengths) + count * each) + _before_steps(settings, passed)
        return _Counted(passed, steps, len(lengths), scored)

    sample = [(member.encode(record.prompt, "").ids, []) for record in train[: settings.micro_batch_size]]
    return _reading(context, source, at, sample=sample, rows=settings.micro_batch_size * count, draws=False)


def _longest(context: RewardModelContext) -> int:
    return Sampling.resolve(inherited_sampling(context.recipe, context.inputs.policy.source)).max_new_tokens


def _evaluations(settings: RewardModelSettings, steps: int) -> int:
    """How often held-out rankings are evaluated while training."""
    return 0 if settings.eval_steps is None else math.ceil(steps / settings.eval_steps)


def _before_steps(settings: RewardModelSettings, passed: Passed) -> float:
    """Tokens of the passes that give the mean reward of each step before it is taken."""
    return passed.tokens if settings.batch_sum_coef else 0.0


def _reading(
    context: RewardModelContext,
    source: ModelSource,
    count: Callable[[float | None], _Counted],
    *,
    sample: Sequences,
    rows: int,
    draws: bool,
) -> Reading:
    settings, shape = context.settings, context.shape_of(source.folder)
    rank = settings.lora.rank if settings.adapter == "lora" else None
    trained = shape.weights if rank is None else shape.adapter(rank)
    longest = _longest(context)

    def at(mean: float | None) -> Workload:
        counted = count(mean)
        passed, steps, drawn_for = counted.passed, counted.steps, counted.drawn_for
        flops = shape.training_flops(passed.tokens, pairs=passed.pairs, rank=rank)
        work = [
            passed.training(flops, steps, settings.batch_size, shape, trained),
            Work(
                "eval",
                "forward",
                counted.scored,
                shape.forward_flops(counted.scored),
                rows=settings.micro_batch_size,
                each=counted.records,
                shape=shape,
            ),
            comparing(shape, logits=False),
        ]
        if drawn_for:
            each = mean or longest
            work.append(drawing(shape, "rollout", drawn_for, per_prompt=1, mean=each, longest=longest, rows=32))
            work.append(scoring(shape, "eval", drawn_for, per_prompt=1, mean=each, logits=False))
        members = settings.members + sum(settings.data_curve)
        return Workload(
            records=counted.records,
            unit="rankings",
            optimizer_steps=steps,
            trained=trained,
            work=tuple(one.times(members) for one in work),
            loads=members * (2 + bool(drawn_for)),
            written=members * FLOAT32 * trained * (1 + 3 * (1 + (steps - 1) // settings.checkpoint_steps)),
            largest=passed.largest,
            prompt=max(drawn_for, default=None),
        )  # fmt: skip

    return Reading(
        at, source.path, shape, sample, rows, longest if draws else None, rank, trains=True, has_logits=False
    )


def _passes(
    settings: RewardModelSettings, groups: Sequence[RankedGroup], *, seed: int, is_grouped: bool
) -> tuple[Passed, int]:
    from rlhf_cli.stages.reward_model.data import Batches, by_length, padded_tokens
    from rlhf_cli.training.micro_batches import MicroBatches

    batches = Batches(len(groups), settings.batch_size, settings.epochs, seed)
    cuts = MicroBatches(settings.micro_batch_size, settings.micro_batch_tokens)

    def padded(part: Sequence[int]) -> int:
        return padded_tokens([groups[number] for number in part])

    def parts_of(step: int) -> list[list[int]]:
        return cuts.cut(by_length(groups, batches.groups(step)), padded)

    def measure(part: list[int]) -> tuple[int, int, int]:
        tokens = sum(_tokens(groups[number], is_grouped=True) for number in part) if is_grouped else padded(part)
        return tokens, 0, sum(len(one) ** 2 for number in part for one in groups[number].sequences)

    return count_passes(batches.steps, parts_of, measure), batches.steps


def _shared(group: RankedGroup) -> int:
    """Tokens at the beginning that all sequences of a group share."""
    columns = zip(*(one.ids for one in group.sequences), strict=False)
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))


def _tokens(group: RankedGroup, *, is_grouped: bool) -> int:
    """Tokens that a pass over a group reads; a shared beginning is read once where the model reads groups."""
    whole = sum(map(len, group.sequences))
    return whole - (len(group.sequences) - 1) * _shared(group) if is_grouped else whole
