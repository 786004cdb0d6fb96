"""How prompts and completions become token ids, in training, sampling and scoring alike.

Text: prompt and completion are tokenized apart and their ids joined, and the tokenizer's end token ends a completion.
Chat: the chat template decides. A completion is what it writes for the assistant's turn, up to its turn-end token, and
a reward model reads the whole conversation as the template renders it. In both, a reward model scores the same ids that
it was trained on (traps 10 and 11 of docs/ppo.md), and the ids of a prompt begin the sequence that a policy trains on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rlhf_cli.data.records import Message, Prompt, messages_of
from rlhf_cli.data.rendering import Conversation, Opening, common_length, locate_completion, locate_turns
from rlhf_cli.data.special_tokens import CONTENT, SpecialTokens, ids_of
from rlhf_cli.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_TURNS = "order the turns as the template expects: usually the user first, then the assistant in turn"


@dataclass(frozen=True)
class PromptFormat:
    """Turns prompts and completions into the token ids of one tokenizer.

    A text that spells a special token, such as `<|im_end|>`, stays text where a template writes around it. Without any
    template, text counts as rendered already, so the special tokens in it are control tokens.

    Args:
        tokenizer: any Hugging Face tokenizer with an end-of-text token.
        template: for plain text prompts: None leaves them as they are, "chat" makes one user message of them and
            applies the tokenizer's chat template, else text around `{prompt}`.
        name: where the tokenizer came from, for messages.
        is_encoder: an encoder reads prompt and completion as a pair (BERT's [CLS] a [SEP] b [SEP]).
        is_encoder_decoder: an encoder reads the prompt and a decoder the completion (T5), so the prompt keeps the end
            token that the encoder knows from its training.
        template_kwargs: further variables of the chat template, such as `enable_thinking`.

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

    @cached_property
    def _special(self) -> SpecialTokens:
        return SpecialTokens(self.tokenizer)

    def is_chat(self, prompt: Prompt) -> bool:
        """Whether the chat template renders this prompt."""
        return self.template == "chat" or not isinstance(prompt, str)

    def spells_special_token(self, text: str) -> bool:
        """Whether a text spells a special token of the tokenizer."""
        return self._special.are_spelled_in(text)

    def prompt_string(self, prompt: Prompt) -> str:
        """Return the text that the model sees before the completion begins."""
        return self._special.unescape(self._prompt_text(prompt))

    def _prompt_text(self, prompt: Prompt) -> str:
        """Return `prompt_string` with the special tokens escaped that its messages spell."""
        if self.is_encoder and not isinstance(prompt, str) and not self._has_chat_template:
            return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)
        if self.is_chat(prompt):
            return self._render(messages_of(prompt))
        assert isinstance(prompt, str)
        text = self._literal(prompt, prompt)
        return text if self.template is None else self.template.replace("{prompt}", text)

    def keeps_text(self, prompt: Prompt) -> bool:
        """Whether a prompt, and its completion, that spell a special token stay text."""
        is_decoder = not (self.is_encoder or self.is_encoder_decoder)
        return is_decoder and (self.template is not None or self.is_chat(prompt))

    def _literal(self, text: str, prompt: Prompt = ()) -> str:
        """Escape the special tokens that a text spells, which is the content of a message or belongs to `prompt`."""
        return self._special.escape(text) if self.keeps_text(prompt) else text

    def _written(self, text: str, prompt: Prompt = ()) -> str:
        """Escape in a text of the assistant the special tokens that structure a conversation.

        Others, such as `[THINK]`, are what a policy writes: they stay control tokens.
        """
        return self._special.escape(text, self._structural) if self.keeps_text(prompt) else text

    @cached_property
    def _structural(self) -> frozenset[str]:
        """The special tokens with a role in the tokenizer, such as BOS, and those that the chat template writes."""
        named = self.tokenizer.special_tokens_map.values()
        found = frozenset(text for text in named if isinstance(text, str))
        if not self._has_chat_template:
            return found
        talk = (Message("system", "a"), Message("user", "a"), Message("assistant", "a"))
        for turns in (talk, talk[1:]):
            for opens_turn in (False, True):
                with contextlib.suppress(ModelError):  # it wants other turns
                    found |= self._special.found_in(self._apply_template(turns, opens_turn=opens_turn))
        return found

    def _render(self, messages: tuple[Message, ...], *, opens_turn: bool = True) -> str:
        """Apply the chat template; `opens_turn` adds the generation prompt, which opens a turn of the assistant."""
        if not self._has_chat_template:
            raise ModelError(
                f"the data holds conversations and {self.name} has no chat template",
                hint="use a model whose tokenizer has one, save `chat_template.jinja` beside it, or give text prompts",
            )
        turns = [
            Message(one.role, (self._written if one.role == "assistant" else self._literal)(one.content))
            for one in messages
        ]
        return self._apply_template(turns, opens_turn=opens_turn)

    def _apply_template(self, messages: Iterable[Message], *, opens_turn: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=opens_turn, **self.template_kwargs
            )
        except Exception as error:  # jinja raises what the template's author chose
            is_refusal = type(error).__name__ == "TemplateError"
            raise ModelError(
                f"the chat template of {self.name} refuses a conversation: {error}",
                hint=_TURNS if is_refusal else "correct the chat template of its tokenizer",
            ) from error
        assert isinstance(text, str)
        return text

    def conversation(self, prompt: Prompt, completion: str) -> Conversation:
        """Render a chat prompt with its completion.

        Raises:
            ModelError: the template refuses it.
        """
        messages = messages_of(prompt)
        whole = self._render((*messages, Message("assistant", completion)), opens_turn=False)
        return locate_completion(self._render(messages), whole, self._written(completion), self._special)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt, ending where the completion begins."""
        text = self._prompt_text(prompt)
        # A chat template writes its own special tokens; plain text gets the ones the tokenizer puts in front (BOS).
        if self.is_chat(prompt):
            return self._special.ids(text)
        if self.is_encoder or self.is_encoder_decoder:
            return ids_of(self.tokenizer, text, special=True)
        return self._text_ids(text)

    def _text_ids(self, text: str) -> list[int]:
        """Return the ids of a decoder's plain text, with the special tokens that the tokenizer puts before it.

        Some tokenizers close every text with a token that means "the end", which a prompt must not have.
        """
        ids = self._special.ids(text)
        has_bos = self._added_in_front == [self.tokenizer.bos_token_id] == ids[:1]  # a template may write it, too
        return ids if has_bos else self._added_in_front + ids

    @cached_property
    def _added_in_front(self) -> list[int]:
        """The special tokens that the tokenizer adds before a text."""
        plain, closed = (ids_of(self.tokenizer, "a", special=special) for special in (False, True))
        start = next((i for i in range(len(closed)) if closed[i : i + len(plain)] == plain), len(closed) - len(plain))
        return closed[:start]

    def completion_ids(self, completion: str, *, ended: bool = True) -> list[int]:
        """Return the ids of a completion of plain text, with the end-of-text token if it `ended`."""
        ids = self._special.ids(self._written(completion, ""))
        return [*ids, self._end] if ended else ids

    @property
    def _end(self) -> int:
        end = self.tokenizer.eos_token_id
        assert isinstance(end, int)
        return end

    def sequence_ids(self, prompt: Prompt, completion: str) -> tuple[list[int], list[int]]:
        """Return the ids of a prompt and of the completion that a policy learns to write after it.

        In a chat the completion is what the template writes for the assistant's turn, reasoning block included, up to
        and including its turn-end token; a template that writes none gets the tokenizer's end token.
        """
        prompt_ids = self.prompt_ids(prompt)
        if not self.is_chat(prompt) or self.is_encoder_decoder:
            return prompt_ids, self.completion_ids(completion)
        chat = self.conversation(prompt, completion)
        ids = self._special.ids(chat.prompt + chat.completion)
        # Where the prompt's last tokens merge with the completion's first, the completion is tokenized apart.
        is_prefix = ids[: len(prompt_ids)] == prompt_ids
        completion_ids = ids[len(prompt_ids) :] if is_prefix else self._special.ids(chat.completion)
        return prompt_ids, completion_ids if chat.turn_end is not None else [*completion_ids, self._end]

    def pair_ids(self, prompt: Prompt, completion: str, *, ended: bool = True) -> list[int]:
        """Return the ids of prompt and completion as a reward model reads them.

        In a chat these are the ids that the tokenizer's `apply_chat_template` gives for the whole conversation. One
        that has not `ended`, because the length limit cut it, stops after its content.
        """
        if self.is_encoder:
            return list(self.tokenizer(self.prompt_string(prompt), completion)["input_ids"])  # type: ignore[arg-type]
        if not self.is_chat(prompt):
            return self.prompt_ids(prompt) + self.completion_ids(completion, ended=ended)
        chat = self.conversation(prompt, completion)
        if not ended:
            return self._special.ids(chat.whole[: chat.content_end])
        if chat.turn_end is not None:
            return self._special.ids(chat.whole)
        prompt_ids, completion_ids = self.sequence_ids(prompt, completion)
        return prompt_ids + completion_ids

    def leading_ids(self, prompt: Prompt) -> list[int]:
        """Return the ids that come before the content of the prompt: BOS, and in a chat all that the template writes
        before the text of the first user."""
        if isinstance(prompt, str):
            marked: Prompt = CONTENT
        else:
            user = next((at for at, message in enumerate(prompt) if message.role == "user"), 0)
            marked = (*prompt[:user], replace(prompt[user], content=CONTENT), *prompt[user + 1 :])
        text = self._prompt_text(marked).partition(CONTENT)[0]
        return self._special.ids(text) if self.is_chat(prompt) else self._text_ids(text)

    def kept_in_front(self, prompt: Prompt, ids: list[int], max_length: int) -> int:
        """Return how many tokens a reward model keeps in front of what it cuts from a sequence that is too long.

        An encoder's pooled head reads its first token. What a decoder's template writes before the text of the first
        user stays, unless it takes up half of what the model reads.
        """
        if self.is_encoder:
            return 1
        front = common_length(ids, self.leading_ids(prompt))
        return front if front <= max_length // 2 else 1

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a completion: the tokenizer's end token, and the turn-end token of its chat template."""
        ends = set() if self.tokenizer.eos_token_id is None else {self._end}
        return frozenset(ends if self._turn_end is None else ends | {self._special.id_of(self._turn_end)})

    @cached_property
    def _turn_end(self) -> str | None:
        """The special token that the chat template writes after the assistant's content, if any."""
        if not self._has_chat_template:
            return None
        try:
            return self.conversation((Message("user", "a"),), "a").turn_end
        except ModelError:  # it wants other turns, which the data may have
            return None

    def assistant_spans(self, prompt: Prompt) -> list[tuple[int, int] | None]:
        """Find the assistant's earlier turns in `prompt_ids(prompt)`, as (start, stop) with their turn-end token.

        Turns that the data excludes from training are not returned.

        None stands for a turn that cannot be located, because the template renders the beginning of a conversation
        differently once it is longer.
        """
        if isinstance(prompt, str) or self.is_encoder_decoder:  # a decoder that writes the last completion alone
            return []
        numbers = [at for at, message in enumerate(prompt) if message.role == "assistant" and at]
        openings = [
            Opening(
                before=self._render(prompt[:at], opens_turn=False),
                opened=self._render(prompt[:at]),
                header=self._header(prompt, at),
                content=self._written(prompt[at].content),
            )
            for at in numbers
        ]
        text, ids = self._prompt_text(prompt), self.prompt_ids(prompt)
        return [
            None if span is None else (self._tokens(text[: span[0]], ids), self._tokens(text[: span[1]], ids))
            for at, span in zip(numbers, locate_turns(text, openings, self._special, self._turn_end), strict=True)
            if prompt[at].is_trained
        ]

    def _header(self, prompt: tuple[Message, ...], at: int) -> str | None:
        """Return what is rendered before the content of a message; None if the template drops the content."""
        marked = self._prompt_text((*prompt[:at], replace(prompt[at], content=CONTENT), *prompt[at + 1 :]))
        return marked.partition(CONTENT)[0] if CONTENT in marked else None

    def _tokens(self, beginning: str, ids: list[int]) -> int:
        """Return how many of `ids` the beginning of their text consists of."""
        return common_length(self._special.ids(beginning), ids)
