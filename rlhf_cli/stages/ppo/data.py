"""What the `ppo` stage reads: prompts to train on, held-out prompts to evaluate on, demonstrations for PPO-ptx."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_cli.data.records import Demonstration, PromptRecord, Record
from rlhf_cli.errors import DataError
from rlhf_cli.stages.common import EXCERPT, load_prompts, split_from, warn_of_trained
from rlhf_cli.stages.inputs import present
from rlhf_cli.stages.ppo.stage import PPOContext

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlhf_cli.data.examples import Example
    from rlhf_cli.data.records import Prompt
    from rlhf_cli.data.skips import SkipLog
    from rlhf_cli.data.splits import Split
    from rlhf_cli.generation.policy import Policy
    from rlhf_cli.generation.prompts import TokenizedPrompts
    from rlhf_cli.stages.ppo.ptx import Demonstrations


@dataclass(frozen=True)
class PPOData:
    """What PPO reads.

    Attributes:
        prompts: to train on.
        held_out: to evaluate on and to show; may be None where neither is asked for.
        demonstrations: for PPO-ptx, or None.
        records: the prompts and demonstrations to train on, as records.
    """

    prompts: TokenizedPrompts
    held_out: TokenizedPrompts | None = None
    demonstrations: Demonstrations | None = None
    records: Sequence[Record] = ()


def load_data(context: PPOContext, policy: Policy) -> tuple[PPOData, SkipLog]:
    """Read everything PPO reads, in token ids of the policy.

    Args:
        context: of the stage.
        policy: that will be trained.

    Raises:
        DataError: no prompt is left to train on, or none is held out to evaluate on.
        UsageError: completions are so long that no prompt fits.
    """
    from rlhf_cli.data.token_lists import TokenLists
    from rlhf_cli.generation.prompts import TokenizedPrompts

    settings = context.settings
    loaded, skips = load_prompts(context, policy, "ppo.max_new_tokens")
    numbers = {prompt: number for number, prompt in enumerate(loaded.prompts)}
    split = split_from(context, context.inputs.policy.source)
    training, held_out = (
        TokenizedPrompts(prompts, TokenLists(loaded.ids[numbers[prompt]] for prompt in prompts), loaded.references)
        for prompts in _split(context, split, loaded)
    )
    records: list[Record] = [PromptRecord(prompt) for prompt in training.prompts]
    demonstrations = None
    if settings.ptx is not None:
        demonstrations, used = _demonstrations(context, policy, split, skips)
        records += used
    return PPOData(training, held_out if len(held_out) else None, demonstrations, records), skips


def _split(context: PPOContext, split: Split, loaded: TokenizedPrompts) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Return the prompts to train on, and those to evaluate and to show while training."""
    from rlhf_cli.data.splits import validation_prompts

    settings, source = context.settings, context.inputs.prompts.source
    held_out = [prompt for prompt in loaded.prompts if split.holds_out(prompt)]
    training = [prompt for prompt in loaded.prompts if not split.holds_out(prompt)]
    if not training:
        raise DataError(
            f"{source}: no prompt is left to train on: all {len(loaded):,} are held out",
            hint="give more prompts, or lower `data.holdout`",
        )
    if settings.eval_steps is not None and len(held_out) < 2:
        raise DataError(
            f"{source}: `ppo.eval_steps` needs two held-out prompts, one of which is left for `evaluate`; "
            f"{len(held_out)} of {len(loaded):,} are held out",
            hint="hold some out with `--set data.holdout=0.1`, or set `ppo.eval_steps=null`",
        )
    warn_of_trained([PromptRecord(prompt) for prompt in held_out], context.inputs.policy.source, "validation")
    if settings.eval_steps is None and settings.show_steps is None:
        return training, []
    # If no prompt is held out, the first training prompts are shown.
    count = max(settings.eval_prompts, settings.shown_prompts)
    chosen = validation_prompts(held_out, count, split.seed)
    return training, chosen or training[: settings.shown_prompts]


def _demonstrations(
    context: PPOContext, policy: Policy, split: Split, skips: SkipLog
) -> tuple[Demonstrations, list[Demonstration]]:
    """Return the demonstrations that fit the policy and whose prompts are not held out, as token ids and as records;
    add the others to `skips`."""
    from rlhf_cli.data.examples import tokenize
    from rlhf_cli.data.skips import Skip
    from rlhf_cli.data.sources import read_records
    from rlhf_cli.data.template_checks import check_records
    from rlhf_cli.models.loading import context_length
    from rlhf_cli.stages.ppo.ptx import Demonstrations

    recipe, settings, source = context.recipe, context.settings, present(context.inputs.demonstrations)
    assert settings.ptx is not None
    loaded = read_records(source, "demonstration", columns=recipe.data.columns, max_skip=recipe.data.max_skip)
    check_records(policy.format, loaded.records)
    records, _ = split.divide(loaded.records)
    is_encoder_decoder = bool(policy.config.is_encoder_decoder)
    longest = min(settings.ptx.max_length, context_length(policy.config))
    used: list[Demonstration] = []
    examples: list[Example] = []
    for record in records:
        example = tokenize(record, policy.format, is_encoder_decoder=is_encoder_decoder)
        if example.longest_side(is_encoder_decoder) > longest:
            skip = Skip(
                record.location or source, f"demonstration longer than {longest:,} tokens", record.completion[:EXCERPT]
            )
            loaded.skips.add(skip)
        else:
            used.append(record)
            examples.append(example)
    loaded.skips.check(loaded.total, recipe.data.max_skip, source)
    for skip in loaded.skips:
        skips.add(skip)
    found = Demonstrations.of((example.prompt_ids, example.completion_ids) for example in examples)
    if not len(found):
        raise DataError(f"{source}: no demonstration is left for `ppo.ptx`", hint="give records that fit the policy")
    return found, used
