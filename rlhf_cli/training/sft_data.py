"""Demonstrations as token rows: what is scored, what shares a row, which rows share an optimiser step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from datasets import Dataset
from torch import Tensor

from rlhf_cli.data.records import Demonstration
from rlhf_cli.data.templates import PromptFormat


@dataclass(frozen=True)
class Example:
    """A demonstration in token ids; the completion closes with the end token."""

    prompt_ids: list[int]
    completion_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    def longest_side(self, is_encoder_decoder: bool) -> int:
        """Tokens of the longest sequence a model reads: both on end, or the longer one in an encoder-decoder."""
        return max(len(self.prompt_ids), len(self.completion_ids)) if is_encoder_decoder else len(self)


def tokenize(record: Demonstration, prompt_format: PromptFormat, *, is_encoder_decoder: bool) -> Example:
    """The ids that later stages see too: prompt and completion tokenized apart, the end token behind.

    Text without a prompt is text to learn from as it is, so no template is put around nothing. What a tokenizer puts in
    front of every text (BOS) counts as the prompt.
    """
    if record.prompt:
        prompt = prompt_format.prompt_ids(record.prompt)
    else:
        bare = PromptFormat(prompt_format.tokenizer, None, prompt_format.name)
        prompt = bare.prompt_ids("")
    completion = prompt_format.completion_ids(record.completion)
    if is_encoder_decoder and not prompt:  # an encoder reads at least its end token
        prompt = [completion[-1]]
    return Example(prompt, completion)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Fill rows of `capacity` tokens, best fit, longest first (Ding et al. 2024, arXiv:2404.10830, without splitting).

    Args:
        lengths: tokens of each example, none over `capacity`.
        capacity: tokens of a row.

    Returns:
        Rows of example numbers; each example is in one row, whole.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> rows that have exactly so many
    for example in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        need = lengths[example]
        room = min((free for free in with_room if free >= need), default=None)
        if room is None:
            row, left = len(rows), capacity - need
            rows.append([example])
        else:
            row, left = with_room[room].pop(0), room - need
            rows[row].append(example)
            if not with_room[room]:
                del with_room[room]
        if left > 0:
            with_room.setdefault(left, []).append(row)
    return rows


def as_dataset(examples: Sequence[Example], rows: Sequence[Sequence[int]]) -> Dataset:
    """Rows of one or several examples: their ids on end, and for each example its length and that of its prompt."""
    return Dataset.from_dict(
        {
            "ids": [[t for n in row for t in examples[n].prompt_ids + examples[n].completion_ids] for row in rows],
            "lengths": [[len(examples[n]) for n in row] for row in rows],
            "prompt_lengths": [[len(examples[n].prompt_ids) for n in row] for row in rows],
        }
    )


@dataclass(frozen=True)
class BatchPlan:
    """Which rows make up each optimiser step, and how a step is cut into micro-batches.

    Every pass over the rows has an order of its own, a function of seed and pass alone. Passes are joined before they
    are cut into steps, so each step but the last has exactly `batch_size` rows, whatever the number of rows; the
    micro-batch size changes only where a step is cut.

    Attributes:
        rows: how many there are.
        epochs: passes over them, may be a fraction.
        batch_size: rows of one optimiser step.
        micro_batch_size: rows of one forward and backward pass.
        seed: of the order.
    """

    rows: int
    epochs: float
    batch_size: int
    micro_batch_size: int
    seed: int

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return ceil(self._total / self.batch_size)

    @property
    def micro_batches_per_step(self) -> int:
        """Forward and backward passes of a full step."""
        return ceil(self.batch_size / self.micro_batch_size)

    def epoch_at(self, step: int) -> float:
        """Passes done after so many steps."""
        return min(step * self.batch_size, self._total) / self.rows

    @property
    def _total(self) -> int:
        return max(1, round(self.rows * self.epochs))

    def __len__(self) -> int:
        last = self._total - (self.steps - 1) * self.batch_size
        return (self.steps - 1) * self.micro_batches_per_step + ceil(last / self.micro_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        step: list[int] = []
        for number, row in enumerate(self._order(), start=1):
            step.append(row)
            if len(step) == self.batch_size or number == self._total:
                for start in range(0, len(step), self.micro_batch_size):
                    yield step[start : start + self.micro_batch_size]
                step = []

    def _order(self) -> Iterator[int]:
        left, epoch = self._total, 0
        while left > 0:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            permutation = torch.randperm(self.rows, generator=generator).tolist()[:left]
            yield from permutation
            left, epoch = left - len(permutation), epoch + 1


@dataclass(frozen=True)
class CausalCollator:
    """Rows as a batch for a decoder-only model, padded on the right, where causal attention never looks.

    Padding repeats a row's first token: what attention gives no weight is still multiplied by it, and 0 x NaN is NaN,
    so no token that is not in the row may come near it.

    Emits, each (B, T):
        input_ids: what the model reads.
        targets: the token that follows each position.
        is_completion: bool, True where the target is a token of a completion.
        is_text: bool, True where the target is any token that follows another of its own example.
        position_ids: with `packed`, restarting at every example and on every padding token, which is how transformers
            knows where one example ends: examples of one row do not see each other.
    """

    packed: bool

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Lay the rows out as tensors."""
        width = max(len(row["ids"]) for row in rows)
        input_ids = torch.tensor([row["ids"][0] for row in rows]).unsqueeze(1).repeat(1, width)
        is_completion = torch.zeros(len(rows), width, dtype=torch.bool)
        is_text = torch.zeros(len(rows), width, dtype=torch.bool)
        positions = torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            input_ids[number, : len(row["ids"])] = torch.tensor(row["ids"])
            start = 0
            for length, prompt in zip(row["lengths"], row["prompt_lengths"], strict=True):
                # Position t predicts token t + 1: the first token of an example is predicted by nothing.
                is_text[number, start : start + length - 1] = True
                is_completion[number, start + max(prompt, 1) - 1 : start + length - 1] = True
                positions[number, start : start + length] = torch.arange(length)
                start += length
        batch = {
            "input_ids": input_ids,
            "targets": input_ids.roll(-1, dims=1),
            "is_completion": is_completion,
            "is_text": is_text,
        }
        return batch | {"position_ids": positions} if self.packed else batch


@dataclass(frozen=True)
class Seq2SeqCollator:
    """Rows as a batch for an encoder-decoder: prompts to the encoder, completions to the decoder.

    Emits `encoder_ids` and `encoder_mask` (B, S), and as (B, T) the decoder's `input_ids` (start token, then the
    completion shifted by one), `targets`, `is_completion` and the equal `is_text`.
    """

    decoder_start: int

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Lay the rows out as tensors."""
        prompts = [row["ids"][: row["prompt_lengths"][0]] for row in rows]
        completions = [row["ids"][row["prompt_lengths"][0] :] for row in rows]
        encoder_ids, encoder_mask = _padded(prompts)
        targets, is_completion = _padded(completions)
        decoder_ids, _ = _padded([[self.decoder_start, *completion[:-1]] for completion in completions])
        return {
            "encoder_ids": encoder_ids,
            "encoder_mask": encoder_mask.long(),
            "input_ids": decoder_ids,
            "targets": targets,
            "is_completion": is_completion,
            "is_text": is_completion,
        }


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids padded on the right with a row's first, and where they are real: both (B, T)."""
    ids = torch.tensor([row[0] for row in rows]).unsqueeze(1).repeat(1, max(map(len, rows)))
    is_real = torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        is_real[number, : len(row)] = True
    return ids, is_real
