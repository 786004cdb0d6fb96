"""Prompts and answers as a reward model reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_cli.attention.groups import plan_groups
from rlhf_cli.attention.layout import Layout


@dataclass(frozen=True)
class Encoded:
    """Ids of a prompt and its answer; `types` tells the two apart for encoders that ask for it, else is None."""

    ids: list[int]
    types: list[int] | None = None


@dataclass(frozen=True, eq=False)
class RewardBatch:
    """N sequences as a scorer reads them: in groups with shared prefixes, or padded on the right.

    Attributes:
        input_ids: (B, L); B is 1 in groups, else N. Padding repeats a row's first token: no id, and no weight of an
            unused embedding, can reach a reward through it.
        last: (N,) row of each sequence's last token, counted over the B * L of `input_ids`.
        layout: of groups; None where sequences are padded.
        mask: (N, L) 1 on real tokens, for encoders; a decoder never looks ahead.
        types: (N, L), for encoders that ask for them.
    """

    input_ids: Tensor
    last: Tensor
    layout: Layout | None = None
    mask: Tensor | None = None
    types: Tensor | None = None

    @staticmethod
    def grouped(sequences: Sequence[Encoded], device: torch.device) -> RewardBatch:
        """What sequences share is read once."""
        plan = plan_groups([sequence.ids for sequence in sequences])
        last = torch.tensor([path.last_row for path in plan.paths])
        return RewardBatch(plan.input_ids.to(device), last.to(device), plan.layout)

    @staticmethod
    def padded(sequences: Sequence[Encoded], device: torch.device) -> RewardBatch:
        """A row a sequence."""
        lengths = torch.tensor([len(sequence.ids) for sequence in sequences])
        width = int(lengths.max())
        ids = torch.tensor([sequence.ids[0] for sequence in sequences]).unsqueeze(1).repeat(1, width)
        types = None if sequences[0].types is None else torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
            if types is not None and sequence.types is not None:
                types[row, : len(sequence.types)] = torch.tensor(sequence.types)
        mask = (torch.arange(width) < lengths.unsqueeze(1)).long().to(device)
        last = (torch.arange(len(sequences)) * width + lengths - 1).to(device)
        return RewardBatch(ids.to(device), last, mask=mask, types=None if types is None else types.to(device))
