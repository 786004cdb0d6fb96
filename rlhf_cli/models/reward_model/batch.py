"""Batches of prompts with completions, as a reward model reads them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_cli.attention.groups import plan_groups
from rlhf_cli.attention.layout import Layout
from rlhf_cli.data.token_lists import INT32
from rlhf_cli.models.padding import pad


class Encoded:
    """Token ids of a prompt with its completion, which are held in four bytes each; do not change it.

    Args:
        ids: token ids.
        types: the token types of encoders that use them, else None.
    """

    __slots__ = ("_ids", "_types")

    def __init__(self, ids: Sequence[int], types: Sequence[int] | None = None) -> None:
        self._ids = array(INT32, ids)
        self._types = None if types is None else array("b", types)

    @property
    def ids(self) -> list[int]:
        """Token ids."""
        return self._ids.tolist()

    @property
    def types(self) -> list[int] | None:
        """Token types, None without."""
        return None if self._types is None else self._types.tolist()

    def __len__(self) -> int:
        return len(self._ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Encoded) and (self._ids, self._types) == (other._ids, other._types)

    __hash__ = None  # type: ignore[assignment]  (its ids are an array)

    def __repr__(self) -> str:
        return f"Encoded({self.ids}, {self.types})"


@dataclass(frozen=True, eq=False)
class RewardBatch:
    """N sequences, in groups with shared prefixes or padded on the right.

    Attributes:
        input_ids: (B, L); B is 1 for groups, else N. Padding repeats a row's first token, so it needs no padding id and
            reads no unused embedding.
        last: (N,) index of each sequence's last token among the B * L of `input_ids`.
        layout: layout of groups; None if sequences are padded.
        mask: (N, L), 1 on real tokens, for encoders; a decoder never attends to padding on the right.
        types: (N, L) token types, for encoders that use them.
    """

    input_ids: Tensor
    last: Tensor
    layout: Layout | None = None
    mask: Tensor | None = None
    types: Tensor | None = None

    @staticmethod
    def grouped(sequences: Sequence[Encoded], device: torch.device) -> RewardBatch:
        """Build a batch in which a prefix that sequences share appears once."""
        plan = plan_groups([sequence.ids for sequence in sequences])
        last = torch.tensor([path.last_row for path in plan.paths])
        return RewardBatch(plan.input_ids.to(device), last.to(device), plan.layout)

    @staticmethod
    def padded(sequences: Sequence[Encoded], device: torch.device) -> RewardBatch:
        """Build a batch with one row per sequence."""
        ids, is_real = pad([sequence.ids for sequence in sequences])
        last = torch.arange(len(sequences)) * ids.shape[1] + is_real.sum(dim=1) - 1
        types = None
        if sequences[0].types is not None:
            types = pad([sequence.types or [] for sequence in sequences])[0].masked_fill(~is_real, 0).to(device)
        return RewardBatch(ids.to(device), last.to(device), mask=is_real.long().to(device), types=types)
