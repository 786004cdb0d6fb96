"""How prompts reach a language model: its template, its format and the longest prompt it takes. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.records import Prompt
from rlhf_cli.errors import UsageError
from rlhf_cli.generation.contract import read_contract
from rlhf_cli.progress import say, warn
from rlhf_cli.settings.shared import DataSettings

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


@dataclass(frozen=True)
class PromptStyle:
    """How plain-text prompts become text for a model; see `PromptFormat`.

    Attributes:
        template: None, "chat" or text around `{prompt}`.
        kwargs: arguments of the chat template.
    """

    template: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, prompt_format: PromptFormat) -> PromptStyle:
        """Return the style of a prompt format."""
        return cls(prompt_format.template, prompt_format.template_kwargs)

    def __str__(self) -> str:
        named = {None: "as plain text", "chat": "in its chat template"}.get(self.template, f"as {self.template!r}")
        return f"{named} with {dict(self.kwargs)}" if self.kwargs else named


def prompt_style(
    data: DataSettings,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "the model",
    may_differ: bool = False,
) -> PromptStyle:
    """Return how a model is prompted: as the recipe says, else as it was trained, else as its tokenizer allows.

    Args:
        data: section `data` of the recipe.
        model: folder or hub id of the language model.
        tokenizer: of the model.
        name: what it is, for messages.
        may_differ: a recipe that differs from how the model was trained is only reported, since the stage trains it
            anew or was asked to compare models.

    Raises:
        UsageError: the recipe differs from how the model was trained.
        ModelError: the contract beside the model cannot be read.
    """
    contract = read_contract(model)
    if contract is not None:
        trained = PromptStyle(contract.prompt_template, contract.template_kwargs)
    else:
        trained = PromptStyle("chat" if getattr(tokenizer, "chat_template", None) else None)
    chosen = PromptStyle(
        trained.template if data.prompt_template == "auto" else data.prompt_template,
        trained.kwargs if data.template_kwargs is None else data.template_kwargs,
    )
    if contract is None:
        if data.prompt_template == "auto":
            say(f"{name} is prompted {chosen} (`data.prompt_template: auto`)")
    elif chosen != trained:
        if not may_differ:
            raise UsageError(
                f"`{model}` was trained with prompts {trained}, and the recipe asks for prompts {chosen}",
                hint="remove `data.prompt_template` and `data.template_kwargs` to prompt it as it was trained",
            )
        warn(f"{model} was trained with prompts {trained}; now it is prompted {chosen}")
    return chosen


def text_template(data: DataSettings, policy: str | None) -> str | None:
    """Return the template of plain-text prompts for a reward model that records none and has no chat template.

    Args:
        data: section `data` of the recipe.
        policy: folder or hub id of the model whose completions it scores, if there is one.
    """
    if data.prompt_template != "auto":
        return data.prompt_template
    contract = None if policy is None else read_contract(policy)
    return None if contract is None else contract.prompt_template


def prompt_format(source: ModelSource, style: PromptStyle, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """Return the prompt format of the language model at `source`, which has this style and tokenizer."""
    from rlhf_cli.models.loading import load_config

    return PromptFormat(
        tokenizer=tokenizer,
        template=style.template,
        template_kwargs=style.kwargs,
        name=f"`{source.path}`",
        is_encoder_decoder=load_config(source).is_encoder_decoder,
    )


def token_ids(stop_tokens: Sequence[str], prompt_format: PromptFormat) -> list[int]:
    """Return the ids of stop tokens.

    Raises:
        UsageError: a text is not exactly one token.
    """
    return [_token_id(text, prompt_format) for text in stop_tokens]


def _token_id(text: str, prompt_format: PromptFormat) -> int:
    tokenizer = prompt_format.tokenizer
    found = tokenizer.convert_tokens_to_ids(text)
    if isinstance(found, int) and found != tokenizer.unk_token_id and text in tokenizer.get_vocab():
        return found
    ids = prompt_format.completion_ids(text, ended=False)
    if len(ids) == 1:
        return ids[0]
    raise UsageError(
        f"`stop_tokens`: {text!r} is {len(ids)} tokens of {prompt_format.name}, expected one",
        hint="name a token of the model's vocabulary, such as <|im_end|>",
        setting="stop_tokens",
        value=text,
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
