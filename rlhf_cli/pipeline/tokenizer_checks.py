"""Checks before the first stage that need a tokenizer, but no model: lengths of prompts, stop tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.data.checks import PromptKeys
from rlhf_cli.data.records import prompt_key, prompt_text
from rlhf_cli.data.skips import Skip, SkipLog
from rlhf_cli.data.sources import is_hub, iter_records
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.common import EXCERPT, TOO_LONG, trusts_code
from rlhf_cli.stages.inputs import Input

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_PROMPTS = 1000
"""Prompts that are looked at, so that large sets take less than a second."""


def check_with_tokenizer(
    recipe: Recipe, inputs: Iterable[Input], keys: Mapping[tuple[str, str | None], PromptKeys]
) -> None:
    """Check what a stage will refuse once it has loaded the tokenizer: long prompts, stop tokens that are not tokens.

    The text of a prompt alone is counted. With the template around it, it is longer, so that a stage may refuse more.

    Args:
        recipe: recipe with resolved paths.
        inputs: inputs of all stages that will run; the first local model that completes prompts gives the tokenizer.
        keys: of the prompts that were read from each source.

    Raises:
        DataError: too many prompts of a source are too long.
        UsageError: a text of `stop_tokens` is not one token.
    """
    inputs = list(inputs)
    models = [recipe.model.path, *(given.source for given in inputs if given.kind == "model" and given.sampled_by)]
    path = next((model for model in models if model is not None and Path(model).is_dir()), None)
    sources = [given for given in inputs if given.records == "prompt" and given.use != "evaluate"]
    stops = sorted(set(_stop_tokens(recipe.model_dump())))
    if path is None or not (sources or stops):
        return
    from rlhf_cli.data.chat_format import PromptFormat  # imports torch, which the stages need anyway
    from rlhf_cli.generation.prompts import token_ids
    from rlhf_cli.models.loading import ModelSource, load_tokenizer

    tokenizer = load_tokenizer(ModelSource(path, trust_remote_code=trusts_code(recipe, path)))
    if stops:
        token_ids(stops, PromptFormat(tokenizer, name=f"`{path}`"))
    for source, given in {given.source: given for given in sources}.items():
        if not is_hub(source):
            _check_lengths(recipe, tokenizer, given, len(keys[source, given.records]))


def _stop_tokens(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts of `stop_tokens` in all sections of a recipe."""
    for name, value in settings.items():
        if name == "stop_tokens":
            yield from value or ()
        elif isinstance(value, Mapping):
            yield from _stop_tokens(value)


def _check_lengths(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, given: Input, count: int) -> None:
    from rlhf_cli.data.special_tokens import ids_of

    data, skips = recipe.data, SkipLog()
    records = iter_records(
        given.source, "prompt", columns=data.columns, comparison=data.comparison, on_skip=lambda skip: None
    )
    distinct = {prompt_key(record.prompt): record for record in islice(records, _MOST_PROMPTS)}
    for record in distinct.values():
        text = prompt_text(record.prompt)
        if len(ids_of(tokenizer, text)) > data.max_prompt_tokens:
            reason = f"prompt longer than {data.max_prompt_tokens:,} tokens"
            skips.add(Skip(record.location or given.source, reason, text[:EXCERPT]))
    skips.check(count, data.max_skip, given.source, fix=TOO_LONG)
