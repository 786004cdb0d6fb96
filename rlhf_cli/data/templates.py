"""From prompt and answer to token ids: one way, used in training, sampling and scoring alike.

Prompt and answer are tokenized apart and their ids joined, so the ids a reward model is trained on are the ids it
scores (traps 10 and 11 of docs/ppo.md), and a prompt's ids are always a prefix of the sequence's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlhf_cli.data.records import Message, Prompt
from rlhf_cli.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptFormat:
    """How prompts and answers become ids for one tokenizer.

    Args:
        tokenizer: any Hugging Face tokenizer with an end-of-text token.
        template: for prompts that are plain text: None as they are, "chat" as one user message through the tokenizer's
            chat template, else text around `{prompt}`.
        name: where the tokenizer came from, for messages.
        is_encoder: the ids go to an encoder that reads prompt and answer as a pair (BERT's [CLS] a [SEP] b [SEP]).
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None = None
    name: str = "the tokenizer"
    is_encoder: bool = field(default=False)

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None and not self.is_encoder:
            raise ModelError(
                f"{self.name} has no end-of-text token, so no answer could end",
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
        """The text that the model sees before the answer begins."""
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
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja raises what the template's author chose
            raise ModelError(f"the chat template of {self.name} refuses a conversation: {error}") from error
        assert isinstance(text, str)
        return text

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Ids of the prompt, ending where the answer begins."""
        text = self.prompt_string(prompt)
        # A chat template writes its own special tokens; plain text gets the ones the tokenizer puts in front (BOS).
        is_chat = not isinstance(prompt, str) or self.template == "chat"
        ids = self.tokenizer(text, add_special_tokens=not is_chat).input_ids
        # T5 and BERT close every text with a token that means "the end", which a prompt of a decoder must not have.
        if not is_chat and ids and ids[-1] == self.tokenizer.eos_token_id and not self.is_encoder:
            ids = ids[:-1]
        return ids

    def completion_ids(self, completion: str, *, ended: bool = True) -> list[int]:
        """Ids of an answer; `ended` puts the end-of-text token behind it."""
        ids = self.tokenizer(completion, add_special_tokens=False).input_ids
        return [*ids, self.tokenizer.eos_token_id] if ended else ids

    def pair_ids(self, prompt: Prompt, completion: str, *, ended: bool = True) -> list[int]:
        """Ids of prompt and answer as a scorer reads them."""
        if self.is_encoder:
            return self.tokenizer(self.prompt_string(prompt), completion).input_ids
        return self.prompt_ids(prompt) + self.completion_ids(completion, ended=ended)
