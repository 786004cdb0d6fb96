"""Demonstrations as token ids, as every stage that trains on them reads them."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.records import Demonstration


@dataclass(frozen=True)
class Example:
    """A demonstration in token ids.

    Attributes:
        prompt_ids: the prompt.
        completion_ids: the completion; it ends with an end token.
        earlier_turns: (start, stop) of those of the assistant's earlier turns in `prompt_ids` that are trained, too.
        skipped_turns: number of its earlier turns that are not trained, because they cannot be located in the prompt.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    earlier_turns: tuple[tuple[int, int], ...] = ()
    skipped_turns: int = 0

    @property
    def ids(self) -> list[int]:
        """Prompt and completion concatenated."""
        return self.prompt_ids + self.completion_ids

    def is_trained(self) -> list[bool]:
        """For each of `ids`, whether it is trained: tokens of the completion and of trained earlier turns."""
        found = [False] * len(self.prompt_ids) + [True] * len(self.completion_ids)
        for start, stop in self.earlier_turns:
            found[start:stop] = [True] * (stop - start)
        return found

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    def longest_side(self, is_encoder_decoder: bool) -> int:
        """Tokens of the longest sequence a model reads: both concatenated, or the longer one in an encoder-decoder."""
        return max(len(self.prompt_ids), len(self.completion_ids)) if is_encoder_decoder else len(self)


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
