"""Checks before the first stage that prompts are not too long: with the tokenizer alone, without a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

from rlhf_cli.data.checks import PromptKeys
from rlhf_cli.data.records import prompt_key, prompt_text
from rlhf_cli.data.skips import Skip, SkipLog
from rlhf_cli.data.sources import is_hub, iter_records
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.common import EXCERPT, TOO_LONG, trusts_code
from rlhf_cli.stages.inputs import Input

_MOST_PROMPTS = 1000
"""Prompts that are looked at, so that large sets take less than a second."""


def check_prompt_lengths(
    recipe: Recipe, inputs: Iterable[Input], keys: Mapping[tuple[str, str | None], PromptKeys]
) -> None:
    """Raise `DataError` if a stage that reads these prompts will refuse them, as too many are too long.

    The text of a prompt alone is counted. With the template around it, it is longer, so that a stage may refuse more.

    Args:
        recipe: recipe with resolved paths.
        inputs: inputs of all stages that will run; the first local model that completes prompts gives the tokenizer.
        keys: of the prompts that were read from each source.
    """
    inputs = list(inputs)
    models = [recipe.model.path, *(given.source for given in inputs if given.kind == "model" and given.sampled_by)]
    path = next((model for model in models if model is not None and Path(model).is_dir()), None)
    sources = {given.source: given for given in inputs if given.records == "prompt" and given.use != "evaluate"}
    if path is None or not sources:
        return
    from rlhf_cli.data.special_tokens import ids_of
    from rlhf_cli.models.loading import ModelSource, load_tokenizer  # imports torch, which the stages need anyway

    data = recipe.data
    tokenizer = load_tokenizer(ModelSource(path, trust_remote_code=trusts_code(recipe, path)))
    for source, given in sources.items():
        if is_hub(source):
            continue
        skips = SkipLog()
        records = iter_records(
            source, "prompt", columns=data.columns, comparison=data.comparison, on_skip=lambda skip: None
        )
        distinct = {prompt_key(record.prompt): record for record in islice(records, _MOST_PROMPTS)}
        for record in distinct.values():
            text = prompt_text(record.prompt)
            if len(ids_of(tokenizer, text)) > data.max_prompt_tokens:
                reason = f"prompt longer than {data.max_prompt_tokens:,} tokens"
                skips.add(Skip(record.location or source, reason, text[:EXCERPT]))
        skips.check(len(keys[source, given.records]), data.max_skip, source, fix=TOO_LONG)
