"""Demonstrations as token rows: what is scored, what shares a row, which rows share an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from rlhf_cli.attention.groups import plan_groups
from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.records import Demonstration


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


def pack_groups(examples: Sequence[Example], capacity: int) -> list[list[int]]:
    """Fill rows as `pack` does where a row reads a prompt once for all its completions in that row.

    Completions of one prompt stay together, as many as fit behind it.

    Args:
        examples: none over `capacity` tokens.
        capacity: tokens of a row.

    Returns:
        Rows of example numbers.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for number, example in enumerate(examples):
        # Text without a prompt shares nothing.
        by_prompt.setdefault(tuple(example.prompt_ids) or (-1 - number,), []).append(number)
    units: list[list[int]] = []
    lengths: list[int] = []
    for members in by_prompt.values():
        prompt = len(examples[members[0]].prompt_ids)
        completions = [len(examples[number].completion_ids) for number in members]
        for part in pack(completions, capacity - prompt):
            units.append([members[place] for place in part])
            lengths.append(prompt + sum(completions[place] for place in part))
    return [[number for unit in row for number in units[unit]] for row in pack(lengths, capacity)]


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
    """Which rows make up each optimizer step, and how a step is cut into micro-batches.

    Every pass over the rows has an order of its own, a function of seed and pass alone. Passes are joined before they
    are cut into steps, so each step but the last has exactly `batch_size` rows, whatever the number of rows; the
    micro-batch size changes only where a step is cut.

    Attributes:
        rows: how many there are.
        epochs: passes over them, may be a fraction.
        batch_size: rows of one optimizer step.
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
        """Optimizer steps."""
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


Batch = dict[str, Any]
"""What a collator makes of rows: the tensors that a model reads, and which tokens it is to predict.

    input_ids: (B, L) what the model, or its decoder, reads.
    predicting: (N,) rows of `input_ids`, counted over its B * L, that predict a token.
    targets: (N,) the token that each predicts.
    completions: (N,) of how many examples it is a token of the completion. More than one where examples share it.
    texts: (N,) of how many examples it is any token but the first.

A decoder-only model gets `layout` (groups) or, with several examples in a row, `position_ids` (B, L) as well; an
encoder-decoder `encoder_ids` and `encoder_mask` (B, S).
"""


@dataclass(frozen=True)
class GroupCollator:
    """Rows as a batch for a model that takes groups: all examples in one row of tokens, common prefixes once."""

    def __call__(self, rows: list[dict[str, list[int]]]) -> Batch:
        """Lay the rows out as tensors."""
        examples = [example for row in rows for example in _examples(row)]
        plan = plan_groups([ids for ids, _ in examples])
        predictions = _predictions(examples, [path.rows() for path in plan.paths])
        return {"input_ids": plan.input_ids, "layout": plan.layout, **predictions}


@dataclass(frozen=True)
class CausalCollator:
    """Rows as a batch for a decoder-only model, padded on the right, where causal attention never looks.

    Padding repeats a row's first token: what attention gives no weight is still multiplied by it, and 0 x NaN is NaN,
    so no token that is not in the row may come near it.

    Attributes:
        packed: rows hold several examples. Positions then start again at every example and on every padding token,
            which is how transformers knows where one example ends: examples of one row do not see each other.
    """

    packed: bool

    def __call__(self, rows: list[dict[str, list[int]]]) -> Batch:
        """Lay the rows out as tensors."""
        input_ids, _ = _padded([row["ids"] for row in rows])
        positions = torch.zeros_like(input_ids)
        examples, where = [], []
        for number, row in enumerate(rows):
            start = 0
            for ids, prompt in _examples(row):
                positions[number, start : start + len(ids)] = torch.arange(len(ids))
                examples.append((ids, prompt))
                where.append(torch.arange(start, start + len(ids)) + number * input_ids.shape[1])
                start += len(ids)
        batch = {"input_ids": input_ids, **_predictions(examples, where)}
        return batch | {"position_ids": positions} if self.packed else batch


@dataclass(frozen=True)
class Seq2SeqCollator:
    """Rows as a batch for an encoder-decoder: prompts to the encoder, completions to the decoder.

    The decoder reads a start token, then the completion shifted by one.
    """

    decoder_start: int

    def __call__(self, rows: list[dict[str, list[int]]]) -> Batch:
        """Lay the rows out as tensors."""
        prompts = [row["ids"][: row["prompt_lengths"][0]] for row in rows]
        completions = [row["ids"][row["prompt_lengths"][0] :] for row in rows]
        encoder_ids, encoder_mask = _padded(prompts)
        decoder_ids, is_real = _padded([[self.decoder_start, *completion[:-1]] for completion in completions])
        once = torch.ones(int(is_real.sum()), dtype=torch.long)
        return {
            "encoder_ids": encoder_ids,
            "encoder_mask": encoder_mask.long(),
            "input_ids": decoder_ids,
            "predicting": is_real.flatten().nonzero().squeeze(1),
            "targets": torch.tensor([token for completion in completions for token in completion]),
            "completions": once,
            "texts": once,
        }


def _examples(row: dict[str, list[int]]) -> Iterator[tuple[list[int], int]]:
    """Ids of each example in a row, and how many of them are its prompt."""
    start = 0
    for length, prompt in zip(row["lengths"], row["prompt_lengths"], strict=True):
        yield row["ids"][start : start + length], prompt
        start += length


def _predictions(examples: Sequence[tuple[list[int], int]], rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """What is to be predicted from where, and how often it counts: see `Batch`.

    A row predicts the token behind it in its own example, so the first token of an example is predicted by nothing.
    Examples that share a prefix share its rows; what they all predict from one of them is computed once.

    Args:
        examples: ids of each, and how many of them are its prompt.
        rows: of the tokens of each.
    """
    row = torch.cat([of_example[:-1] for of_example in rows])
    target = torch.cat([torch.tensor(ids[1:], dtype=torch.long) for ids, _ in examples])
    is_completion = torch.cat([torch.arange(1, len(ids)) >= prompt for ids, prompt in examples])
    vocabulary = int(target.max()) + 1 if len(target) else 1
    kept, place = (row * vocabulary + target).unique(return_inverse=True)
    none = torch.zeros(len(kept), dtype=torch.long)
    return {
        "predicting": kept // vocabulary,
        "targets": kept % vocabulary,
        "completions": none.index_add(0, place, is_completion.long()),
        "texts": none.index_add(0, place, torch.ones_like(place)),
    }


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids padded on the right with a row's first, and where they are real: both (B, T)."""
    ids = torch.tensor([row[0] for row in rows]).unsqueeze(1).repeat(1, max(map(len, rows)))
    is_real = torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        is_real[number, : len(row)] = True
    return ids, is_real
