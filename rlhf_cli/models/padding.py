"""Padding: rows of token ids of different length as one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def pad(rows: Sequence[Sequence[int]], *, side: Literal["left", "right"] = "right") -> tuple[Tensor, Tensor]:
    """Pad rows to the length of the longest with their own first token.

    A token that attention ignores is still multiplied by a weight of 0, and 0 x NaN is NaN: so padding uses no token,
    and no embedding, that is not in the row already.

    Args:
        rows: B lists of token ids, none empty.
        side: where the padding goes.

    Returns:
        ids: (B, L) int64.
        is_real: (B, L) bool, False on padding.
    """
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    positions = torch.arange(width).expand(len(rows), width)
    is_real = positions < lengths.unsqueeze(1) if side == "right" else positions >= width - lengths.unsqueeze(1)
    ids = torch.tensor([row[0] for row in rows]).unsqueeze(1).repeat(1, width)
    ids[is_real] = torch.tensor([token for row in rows for token in row])
    return ids, is_real
