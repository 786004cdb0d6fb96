"""How prompts reach a language model: its template, its format and the longest prompt it takes. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.records import Prompt
from rlhf_cli.errors import UsageError
from rlhf_cli.progress import warn
from rlhf_cli.settings.run import artifact_settings

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from rlhf_cli.models.loading import ModelSource


@dataclass(frozen=True)
class TokenizedPrompts:
    """N prompts, as records and as token ids of the policy that completes them.

    Attributes:
        prompts: plain text or conversations.
        ids: their token ids, in the same order.
        references: see `references_of`.
    """

    prompts: Sequence[Prompt]
    ids: Sequence[list[int]]
    references: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def first(self, count: int) -> TokenizedPrompts:
        """Return the first `count` prompts."""
        return TokenizedPrompts(self.prompts[:count], self.ids[:count], self.references)


def prompt_template(configured: str | None, model: str, *, warns: bool = True) -> str | None:
    """Return the template for plain text prompts: the configured one, else the one the model was trained with.

    A model trained in another run keeps its template, so a stage that is run alone prompts it as it was trained.

    Args:
        configured: `data.prompt_template` of the recipe.
        model: folder or hub id of the language model.
        warns: print a warning if the two differ.
    """
    trained = artifact_settings(Path(model)).get("data", {}).get("prompt_template")
    if configured is None:
        return trained
    if warns and trained not in (None, configured):
        warn(f"{model} was trained with `data.prompt_template: {trained!r}`, not {configured!r}")
    return configured


def prompt_format(
    source: ModelSource, template: str | None, tokenizer: PreTrainedTokenizerBase | None = None
) -> PromptFormat:
    """Return the prompt format of the language model at `source`.

    Args:
        source: where the model is.
        template: `data.prompt_template` of the recipe; see `prompt_template`.
        tokenizer: of the model; None loads it.
    """
    from rlhf_cli.models.loading import load_config, load_tokenizer

    return PromptFormat(
        tokenizer=tokenizer if tokenizer is not None else load_tokenizer(source),
        template=prompt_template(template, source.path),
        name=f"`{source.path}`",
        is_encoder_decoder=load_config(source).is_encoder_decoder,
    )


def longest_prompt(config: PretrainedConfig, max_new_tokens: int, *, name: str, setting: str) -> int:
    """Return the longest prompt, in tokens, that the model can complete with `max_new_tokens` tokens.

    An encoder-decoder reads prompts apart from completions, so they do not share its context.

    Args:
        config: of the model.
        max_new_tokens: longest completion.
        name: of the model, for messages.
        setting: the setting that `max_new_tokens` comes from, for messages.

    Raises:
        UsageError: not even one prompt token fits.
    """
    from rlhf_cli.models.loading import context_length

    context = context_length(config)
    hint = f"lower it, such as `--set {setting}=64`"
    decoder = getattr(config, "max_position_embeddings", None) if config.is_encoder_decoder else None
    if isinstance(decoder, int) and max_new_tokens > decoder:
        raise UsageError(
            f"completions of {max_new_tokens:,} tokens are too long: the decoder of {name} writes at most {decoder:,}",
            hint=hint,
        )
    longest = context if config.is_encoder_decoder else context - max_new_tokens
    if longest < 1:
        raise UsageError(
            f"completions of {max_new_tokens:,} tokens leave no room for a prompt: {name} reads {context:,} tokens "
            "in all",
            hint=hint,
        )
    return longest
