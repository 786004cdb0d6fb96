"""Demonstrations as token ids, as every stage that trains on them reads them."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.records import Demonstration


@dataclass(frozen=True)
class Example:
    """A demonstration in token ids; the completion ends with the end token."""

    prompt_ids: list[int]
    completion_ids: list[int]

    @property
    def ids(self) -> list[int]:
        """Prompt and completion concatenated."""
        return self.prompt_ids + self.completion_ids

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    def longest_side(self, is_encoder_decoder: bool) -> int:
        """Tokens of the longest sequence a model reads: both concatenated, or the longer one in an encoder-decoder."""
        return max(len(self.prompt_ids), len(self.completion_ids)) if is_encoder_decoder else len(self)


def tokenize(record: Demonstration, prompt_format: PromptFormat, *, is_encoder_decoder: bool) -> Example:
    """Tokenize a demonstration into the ids that later stages see too; see `PromptFormat.sequence_ids`.

    Text without a prompt gets no template. Tokens that a tokenizer puts before every text (BOS) count as the prompt.
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
    return Example(prompt, completion)
