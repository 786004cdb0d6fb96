"""The demonstrations on which the perplexity of every model is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_cli.errors import DataError
from rlhf_cli.progress import say
from rlhf_cli.stages.common import EXCERPT
from rlhf_cli.stages.evaluate.prompts import trained_prompts
from rlhf_cli.stages.evaluate.stage import EvaluateContext
from rlhf_cli.stages.inputs import source_of

if TYPE_CHECKING:
    from rlhf_cli.data.examples import Example
    from rlhf_cli.data.records import Demonstration
    from rlhf_cli.generation.policy import Policy


def load_demonstrations(context: EvaluateContext, policies: Sequence[Policy]) -> list[Demonstration]:
    """Read the demonstrations of `evaluate.demonstrations` that fit all models and that none was trained on.

    Raises:
        DataError: none is left.
    """
    from rlhf_cli.data.records import split_key
    from rlhf_cli.data.sources import Skip, read_records
    from rlhf_cli.data.splits import question
    from rlhf_cli.models.loading import context_length

    if (source := source_of(context.inputs.demonstrations)) is None:
        return []
    data, trained = context.recipe.data, trained_prompts(context)
    loaded = read_records(source, "demonstration", columns=data.columns, max_skip=data.max_skip)
    unseen = [record for record in loaded.records if split_key(question(record)) not in trained]
    if seen := len(loaded.records) - len(unseen):
        say(f"evaluate: {seen:,} of {len(loaded.records):,} demonstrations were trained on and are skipped")
    if not unseen:
        raise DataError(
            f"{source}: a model was trained on the prompts of all {seen:,} demonstrations",
            hint="name other demonstrations with `--set evaluate.demonstrations=PATH`",
        )
    longest = min(context_length(policy.config) for policy in policies)
    kept: list[Demonstration] = []
    for record in unseen:
        examples = [tokenized(record, policy) for policy in policies]
        if all(example.prompt_ids and len(example) <= longest for example in examples):
            kept.append(record)
        else:
            reason = f"demonstration without a prompt or longer than {longest:,} tokens"
            loaded.skips.add(Skip(record.location or source, reason, record.completion[:EXCERPT]))
    loaded.skips.check(loaded.total, data.max_skip, source)
    if not kept:
        raise DataError(f"{source}: no demonstration fits the models", hint="give shorter demonstrations with prompts")
    return kept


def tokenized(record: Demonstration, policy: Policy) -> Example:
    """Return a demonstration in the token ids of a policy."""
    from rlhf_cli.data.examples import tokenize

    return tokenize(record, policy.format, is_encoder_decoder=bool(policy.config.is_encoder_decoder))
