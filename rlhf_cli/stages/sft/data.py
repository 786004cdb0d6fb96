"""Rows of tokenized demonstrations: what shares a row, which rows share an optimizer step, and their batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.attention.groups import plan_groups
from rlhf_cli.data.examples import Example
from rlhf_cli.models.padding import pad
from rlhf_cli.training.shuffle import EndlessShuffle


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Fill rows of `capacity` tokens by best fit, longest first (Ding et al. 2024, arXiv:2404.10830, unsplit).

    Args:
        lengths: tokens of each example, at most `capacity`.
        capacity: tokens per row.

    Returns:
        Rows of example numbers; each example is in exactly one row.
    """
    rows: list[list[int]] = []
    by_space: dict[int, list[int]] = {}  # free tokens -> rows with exactly that many
    for example in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        need = lengths[example]
        space = min((free for free in by_space if free >= need), default=None)
        if space is None:
            row, left = len(rows), capacity - need
            rows.append([example])
        else:
            row, left = by_space[space].pop(0), space - need
            rows[row].append(example)
            if not by_space[space]:
                del by_space[space]
        if left > 0:
            by_space.setdefault(left, []).append(row)
    return rows


def pack_groups(examples: Sequence[Example], capacity: int) -> list[list[int]]:
    """Fill rows like `pack` for a model that reads a prompt once for all its completions in a row.

    As many completions of one prompt as fit share a row with it.

    Args:
        examples: at most `capacity` tokens each.
        capacity: tokens per row.

    Returns:
        Rows of example numbers.
    """
    by_prompt: dict[bytes | int, list[int]] = {}
    for number, example in enumerate(examples):
        # Text without a prompt shares nothing.
        by_prompt.setdefault(example.prompt_key or number, []).append(number)
    units: list[list[int]] = []
    lengths: list[int] = []
    for members in by_prompt.values():
        prompt = len(examples[members[0]].prompt_ids)
        completions = [len(examples[number].completion_ids) for number in members]
        for part in pack(completions, capacity - prompt):
            units.append([members[one] for one in part])
            lengths.append(prompt + sum(completions[one] for one in part))
    return [[number for unit in row for number in units[unit]] for row in pack(lengths, capacity)]


def describe_turns(examples: Sequence[Example]) -> str | None:
    """Describe which turns of conversations are trained; None if no conversation has an earlier turn."""
    earlier, skipped = sum(len(one.earlier_turns) for one in examples), sum(one.skipped_turns for one in examples)
    if not earlier + skipped:
        return None
    text = f"training on {len(examples) + earlier:,} assistant turns in {len(examples):,} demonstrations"
    if skipped:
        text += f"; {skipped:,} earlier turns are skipped: the chat template renders them differently in longer ones"
    return text


class BatchPlan:
    """Which rows make up each optimizer step.

    Every epoch has an order of its own. Epochs are concatenated before they are cut into steps, so each step but the
    last has exactly `batch_size` rows, whatever the number of rows.

    Args:
        rows: number of rows.
        epochs: passes over the rows, not necessarily a whole number.
        batch_size: rows per optimizer step.
        seed: of the order.
    """

    def __init__(self, rows: int, epochs: float, batch_size: int, seed: int) -> None:
        self._rows, self._batch_size = rows, batch_size
        self._total = max(1, round(rows * epochs))
        self._order = EndlessShuffle(rows, seed=seed, name="demonstrations")
        self.steps = ceil(self._total / batch_size)

    def rows_of(self, step: int) -> list[int]:
        """Return the numbers of the rows of the 0-based step."""
        return self._order.slice(step * self._batch_size, min((step + 1) * self._batch_size, self._total))

    def epoch_after(self, steps: int) -> float:
        """Return the passes over the rows that are done after `steps` steps."""
        return min(steps * self._batch_size, self._total) / self._rows


Batch = dict[str, Any]
"""What a collator makes of rows: the tensors that a model reads, and the tokens that it predicts.

    input_ids: (B, L), read by the model or by its decoder.
    predicting: (N,) positions in the flattened `input_ids` (B * L) that predict a token.
    targets: (N,) the token that each of them predicts.
    completions: (N,) number of examples in which the target is a token that is trained, of the completion or of an
        earlier turn of the assistant; above 1 where examples share it.
    texts: (N,) number of examples in which the target is any token but the first.
    trained: (n,) where `completions` is above 0; found here, since on a GPU its length would have to be waited for.

A decoder-only model also gets `layout` (groups), or `is_real` (B, L), False on padding, and, with several examples per
row, `position_ids` (B, L); an encoder-decoder gets `encoder_ids` and `encoder_mask` (B, S).
"""

Row = Sequence[Example]
"""The examples of one row: one, or several where rows are packed."""


@dataclass(frozen=True)
class GroupCollator:
    """Collates for a model that takes groups: all examples in one row of tokens, common prefixes once."""

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Collate rows into a batch."""
        examples = [example for row in rows for example in row]
        plan = plan_groups([example.ids for example in examples])
        predictions = _predictions(examples, [path.rows() for path in plan.paths])
        return {"input_ids": plan.input_ids, "layout": plan.layout, **predictions}


@dataclass(frozen=True)
class CausalCollator:
    """Collates for a decoder-only model, padded on the right, where causal attention never looks.

    Padding repeats a row's first token. Attention multiplies what it gives no weight by 0, and 0 x NaN is NaN, so no
    token from outside the row may enter it.

    Attributes:
        packed: rows hold several examples. Positions then restart at every example and at every padding token, which
            tells transformers where an example ends: examples of one row do not attend to each other.
    """

    packed: bool

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Collate rows into a batch."""
        input_ids, is_real = pad([[token for example in row for token in example.ids] for row in rows])
        positions = torch.zeros_like(input_ids)
        examples, where = [], []
        for number, row in enumerate(rows):
            start = 0
            for example in row:
                end = start + len(example)
                positions[number, start:end] = torch.arange(len(example))
                examples.append(example)
                where.append(torch.arange(start, end) + number * input_ids.shape[1])
                start = end
        batch = {"input_ids": input_ids, "is_real": is_real, **_predictions(examples, where)}
        return batch | {"position_ids": positions} if self.packed else batch


@dataclass(frozen=True)
class Seq2SeqCollator:
    """Collates rows of one example for an encoder-decoder: prompts to the encoder, completions to the decoder.

    The decoder reads a start token, then the completion shifted by one.
    """

    decoder_start: int

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Collate rows into a batch."""
        completions = [example.completion_ids for (example,) in rows]
        encoder_ids, encoder_mask = pad([example.prompt_ids for (example,) in rows])
        decoder_ids, is_real = pad([[self.decoder_start, *completion[:-1]] for completion in completions])
        once = torch.ones(int(is_real.sum()), dtype=torch.long)
        return {
            "encoder_ids": encoder_ids,
            "encoder_mask": encoder_mask.long(),
            "input_ids": decoder_ids,
            "predicting": is_real.flatten().nonzero().squeeze(1),
            "targets": torch.tensor([token for completion in completions for token in completion]),
            "completions": once,
            "trained": torch.arange(len(once)),
            "texts": once,
        }


def _predictions(examples: Sequence[Example], positions: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return what is predicted at which position, and how often it counts; see `Batch`.

    A position predicts the next token of its own example, so nothing predicts the first token of an example. Examples
    that share a prefix share its positions; what all of them predict there is computed once.

    Args:
        examples: the examples of a batch.
        positions: for each example, the positions of its tokens in the flattened batch.
    """
    row = torch.cat([of_example[:-1] for of_example in positions])
    target = torch.cat([torch.tensor(example.ids[1:], dtype=torch.long) for example in examples])
    is_trained = torch.cat([torch.tensor(example.is_trained()[1:], dtype=torch.long) for example in examples])
    vocabulary = int(target.max()) + 1 if len(target) else 1
    kept, index = (row * vocabulary + target).unique(return_inverse=True)
    none = torch.zeros(len(kept), dtype=torch.long)
    completions = none.index_add(0, index, is_trained)
    return {
        "predicting": kept // vocabulary,
        "targets": kept % vocabulary,
        "completions": completions,
        "trained": completions.nonzero().squeeze(1),
        "texts": none.index_add(0, index, torch.ones_like(index)),
    }
