"""How prompts and completions become token ids, in training, sampling and scoring alike.

Prompt and completion are tokenized apart and their ids joined. So a reward model scores the same ids that it was
trained on (traps 10 and 11 of docs/ppo.md), and the ids of a prompt are always a prefix of those of the sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlhf_cli.data.records import Message, Prompt, Record
from rlhf_cli.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptFormat:
    """Turns prompts and completions into the token ids of one tokenizer.

    Args:
        tokenizer: any Hugging Face tokenizer with an end-of-text token.
        template: for plain text prompts: None leaves them as they are, "chat" makes one user message of them and
            applies the tokenizer's chat template, else text around `{prompt}`.
        name: where the tokenizer came from, for messages.
        is_encoder: an encoder reads prompt and completion as a pair (BERT's [CLS] a [SEP] b [SEP]).
        is_encoder_decoder: an encoder reads the prompt and a decoder the completion (T5), so the prompt keeps the end
            token that the encoder knows from its training.

    Raises:
        ModelError: the tokenizer has no end token, or `template` is "chat" and it has no chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None = None
    name: str = "the tokenizer"
    is_encoder: bool = field(default=False)
    is_encoder_decoder: bool = field(default=False)
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None and not self.is_encoder:
            raise ModelError(
                f"{self.name} has no end-of-text token, so no completion could end",
                hint="add one to its tokenizer_config.json (`eos_token`), or use another model",
            )
        if self.template == "chat" and not self._has_chat_template:
            raise ModelError(
                f"`data.prompt_template: chat` needs a chat template, and {self.name} has none",
                hint='use text instead, such as `--set data.prompt_template="Question: {prompt}\\nAnswer: "`',
            )

    @property
    def _has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def prompt_string(self, prompt: Prompt) -> str:
        """Return the text that the model sees before the completion begins."""
        if isinstance(prompt, str):
            if self.template == "chat":
                return self._chat((Message("user", prompt),))
            return prompt if self.template is None else self.template.replace("{prompt}", prompt)
        if self.is_encoder and not self._has_chat_template:
            return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)
        return self._chat(prompt)

    def _chat(self, messages: tuple[Message, ...]) -> str:
        if not self._has_chat_template:
            raise ModelError(
                f"the data holds conversations and {self.name} has no chat template",
                hint="use a model whose tokenizer has one, save `chat_template.jinja` beside it, or give text prompts",
            )
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **self.template_kwargs
            )
        except Exception as error:  # jinja raises what the template's author chose
            raise ModelError(
                f"the chat template of {self.name} refuses a conversation: {error}",
                hint="order the turns as the template expects: usually the user first, then the assistant in turn",
            ) from error
        assert isinstance(text, str)
        return text

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt, ending where the completion begins."""
        text = self.prompt_string(prompt)
        # A chat template writes its own special tokens; plain text gets the ones the tokenizer puts in front (BOS).
        is_chat = not isinstance(prompt, str) or self.template == "chat"
        ids = _ids(self.tokenizer, text, special=not is_chat)
        # Some tokenizers close every text with a token that means "the end", which a prompt of a decoder must not have.
        is_closed = not (is_chat or self.is_encoder or self.is_encoder_decoder)
        return ids[: len(ids) - self._closing_tokens] if is_closed else ids

    @cached_property
    def _closing_tokens(self) -> int:
        """Number of special tokens that the tokenizer adds after a text, not before it."""
        plain, closed = (_ids(self.tokenizer, "a", special=special) for special in (False, True))
        start = next((i for i in range(len(closed)) if closed[i : i + len(plain)] == plain), len(closed) - len(plain))
        return len(closed) - start - len(plain)

    def completion_ids(self, completion: str, *, ended: bool = True) -> list[int]:
        """Return the ids of a completion, with the end-of-text token if it `ended`."""
        ids = _ids(self.tokenizer, completion, special=False)
        end = self.tokenizer.eos_token_id
        assert isinstance(end, int)
        return [*ids, end] if ended else ids

    def pair_ids(self, prompt: Prompt, completion: str, *, ended: bool = True) -> list[int]:
        """Return the ids of prompt and completion as a reward model reads them."""
        if self.is_encoder:
            return list(self.tokenizer(self.prompt_string(prompt), completion)["input_ids"])  # type: ignore[arg-type]
        return self.prompt_ids(prompt) + self.completion_ids(completion, ended=ended)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])  # type: ignore[arg-type]


def check_conversations(prompt_format: PromptFormat, records: Iterable[Record]) -> None:
    """Render one conversation per order of turns, since templates differ in the orders they allow.

    Raises:
        DataError: the template refuses one, or the tokenizer has no template; names the record.
    """
    seen: set[tuple[str, ...]] = set()
    for record in records:
        if isinstance(record.prompt, str):
            continue
        roles = tuple(message.role for message in record.prompt)
        if roles in seen:
            continue
        seen.add(roles)
        try:
            prompt_format.prompt_string(record.prompt)
        except ModelError as error:
            raise DataError(
                f"{record.location}: the turns {', '.join(roles)}: {error.message}", hint=error.hint
            ) from error
