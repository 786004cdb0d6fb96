"""Demonstrations as token ids, as every stage that trains on them reads them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.records import Demonstration
from rlhf_cli.data.token_lists import INT32


class Example:
    """A demonstration in token ids, which are held in four bytes each; do not change it.

    Args:
        prompt_ids: the prompt.
        completion_ids: the completion; it ends with an end token.
        earlier_turns: (start, stop) of those of the assistant's earlier turns in `prompt_ids` that are trained, too.
        skipped_turns: number of its earlier turns that are not trained, because they cannot be located in the prompt.
    """

    __slots__ = ("_ids", "_prompt_tokens", "earlier_turns", "skipped_turns")

    def __init__(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        earlier_turns: tuple[tuple[int, int], ...] = (),
        skipped_turns: int = 0,
    ) -> None:
        self._ids, self._prompt_tokens = array(INT32, prompt_ids), len(prompt_ids)
        self._ids.extend(completion_ids)
        self.earlier_turns, self.skipped_turns = earlier_turns, skipped_turns

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt."""
        return self._ids[: self._prompt_tokens].tolist()

    @property
    def completion_ids(self) -> list[int]:
        """The completion; it ends with an end token."""
        return self._ids[self._prompt_tokens :].tolist()

    @property
    def ids(self) -> list[int]:
        """Prompt and completion concatenated."""
        return self._ids.tolist()

    @property
    def prompt_key(self) -> bytes:
        """What two examples have in common if their prompts have the same tokens; empty without a prompt."""
        return self._ids[: self._prompt_tokens].tobytes()

    def is_trained(self) -> list[bool]:
        """For each of `ids`, whether it is trained: tokens of the completion and of trained earlier turns."""
        found = [False] * self._prompt_tokens + [True] * (len(self) - self._prompt_tokens)
        for start, stop in self.earlier_turns:
            found[start:stop] = [True] * (stop - start)
        return found

    def __len__(self) -> int:
        return len(self._ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Example) and self._fields() == other._fields()

    __hash__ = None  # type: ignore[assignment]  (its ids are an array)

    def __repr__(self) -> str:
        return f"Example{self._fields()}"

    def _fields(self) -> tuple[object, ...]:
        return self.prompt_ids, self.completion_ids, self.earlier_turns, self.skipped_turns

    def longest_side(self, is_encoder_decoder: bool) -> int:
        """Tokens of the longest sequence a model reads: both concatenated, or the longer one in an encoder-decoder."""
        prompt = self._prompt_tokens
        return max(prompt, len(self) - prompt) if is_encoder_decoder else len(self)


def reason_to_skip(
    example: Example, *, max_prompt_tokens: int, max_length: int, is_encoder_decoder: bool
) -> str | None:
    """Return why a demonstration is not trained on, or None: its prompt or the whole of it is too long."""
    if len(example.prompt_ids) > max_prompt_tokens:
        return f"prompt longer than {max_prompt_tokens:,} tokens"
    if example.longest_side(is_encoder_decoder) > max_length:
        return f"prompt and completion longer than {max_length:,} tokens"
    return None


def tokenize(
    record: Demonstration, prompt_format: PromptFormat, *, is_encoder_decoder: bool, all_turns: bool = False
) -> Example:
    """Tokenize a demonstration into the ids that later stages see too; see `PromptFormat.sequence_ids`.

    Text without a prompt gets no template. Tokens that a tokenizer puts before every text (BOS) count as the prompt.

    Args:
        record: the demonstration.
        prompt_format: of the model.
        is_encoder_decoder: whether the model is one.
        all_turns: train the assistant's earlier turns in a conversation, too.
    """
    if record.prompt:
        prompt, completion = prompt_format.sequence_ids(record.prompt, record.completion)
    else:
        bare = PromptFormat(prompt_format.tokenizer, None, prompt_format.name)
        prompt, completion = bare.sequence_ids("", record.completion)
        if prompt == completion[:1] and len(completion) > 1:  # the text writes BOS itself
            completion = completion[1:]
    if is_encoder_decoder and not prompt:  # an encoder reads at least an end token
        prompt = [completion[-1]]
    spans = prompt_format.assistant_spans(record.prompt) if all_turns else []
    located = tuple(span for span in spans if span is not None)
    return Example(prompt, completion, located, len(spans) - len(located))
