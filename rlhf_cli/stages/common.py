"""What every stage does first: turn the recipe's settings into the engine's plain arguments. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cli.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_cli.data.templates import PromptFormat
    from rlhf_cli.models.loading import ModelSource


def model_source(recipe: Recipe, path: str) -> ModelSource:
    """How the model at `path` is held, with device and precisions resolved for this machine.

    `model.revision` and `model.trust_remote_code` are about `model.path` and reach no other model.
    """
    from rlhf_cli.models.loading import ModelSource, resolve_device, resolve_precision

    settings = recipe.model
    device = resolve_device(settings.device)
    precision = resolve_precision(settings.precision, device)
    own = path == settings.path
    return ModelSource(
        path=path,
        revision=settings.revision if own else None,
        trust_remote_code=settings.trust_remote_code if own else False,
        dtype=precision if settings.dtype == "auto" else resolve_precision(settings.dtype, device),
        precision=precision,
        attention=settings.attention,
        device=device,
    )


def prompt_format(
    recipe: Recipe, source: ModelSource, tokenizer: PreTrainedTokenizerBase | None = None
) -> PromptFormat:
    """How prompts reach the model at `source`; its tokenizer is loaded if none is given."""
    from rlhf_cli.data.templates import PromptFormat
    from rlhf_cli.models.loading import load_tokenizer

    return PromptFormat(
        tokenizer=tokenizer if tokenizer is not None else load_tokenizer(source),
        template=recipe.data.prompt_template,
        name=f"`{source.path}`",
    )
