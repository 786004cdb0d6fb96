"""What transformers' mask functions stand for.

transformers describes who sees whom by a function of indices, f(batch row, head, query, key), put together from parts:
causal, a window, chunks, packed sequences. Writing such a mask out takes memory with the square of the length. Here the
function is asked along a few diagonals instead, which is enough for masks that are layouts, and at places drawn at
random, which finds those that are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_cli.attention.layout import Layout, Segment, runs_of
from rlhf_cli.errors import ModelError

_PLACES = 8  # keys asked about for every query, beside the diagonals
_HINT = "rerun with `--attention sdpa`, transformers' own"


class Visibility(NamedTuple):
    """What a mask stands for.

    Attributes:
        layout: which rows form which sequence.
        causal: whether a query sees no key behind it.
        window: distance from which on a query sees no key; None for all.
    """

    layout: Layout
    causal: bool
    window: int | None


def padded(is_real: Tensor, query_length: int, query_offset: int) -> Layout:
    """`Layout.padded`, or the dense one it is. Raises `ModelError` where padding lies between tokens.

    Args:
        is_real: (B, Lk) True on real keys.
        query_length: Lq.
        query_offset: key row of the first query.
    """
    batch, keys = is_real.shape
    if query_offset + query_length == keys and bool(is_real.all()):
        return Layout.dense(batch, query_length, keys)
    try:
        return Layout.padded(is_real, query_length=query_length, query_offset=query_offset)
    except ValueError as error:
        raise ModelError(str(error), hint="put all padding of a row on one side, or use `--attention sdpa`") from None


@dataclass(frozen=True)
class MaskFunction:
    """A mask function with the indices it is about.

    Attributes:
        function: whether query i of batch row b sees key j: f(b, head, i, j), on tensors of indices.
        batch: B.
        first_query, queries: index of the first query, and Lq.
        first_key, keys: index of the first key, and Lk.
        local_size: window or chunk that the function has, if any.
        device: to ask on.
    """

    function: Callable[..., Any]
    batch: int
    first_query: int
    queries: int
    first_key: int
    keys: int
    local_size: int | None
    device: torch.device

    def visibility(self, is_real: Tensor) -> Visibility:
        """What the function stands for, together with a padding mask (B, Lk).

        Raises:
            ModelError: it stands for no layout.
        """
        offset = self.first_query - self.first_key
        if self.queries == 1:  # one row of the mask says it all
            seen = self._sees(self._indices(self.first_query, 1).unsqueeze(1), self._indices(self.first_key, self.keys))
            return Visibility(padded(is_real & seen, 1, offset), True, None)
        later = self._indices(self.first_query + 1, self.queries - 1)
        behind = self._sees(later - 1, later)
        starts = torch.nn.functional.pad(~self._sees(later, later - 1), (1, 0))
        causal, window = not bool(behind.any()), self._window()
        if not causal and not bool(behind.all()):
            raise ModelError("the model lets only some tokens see the next one, which is no layout", hint=_HINT)
        if not bool(starts.any()):
            layout = padded(is_real, self.queries, offset)
        elif offset == 0:
            layout = self._cut(starts, is_real)
        else:
            raise ModelError("packed or chunked sequences cannot go on from a cache", hint=_HINT)
        self._check(starts.cumsum(1), causal, window)
        return Visibility(layout, causal, window)

    def _indices(self, first: int, count: int) -> Tensor:
        return torch.arange(first, first + count, device=self.device)

    def _sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Ask about pairs of indices that broadcast to (B, n): (B, n) bool."""
        rows = torch.arange(self.batch, device=self.device).unsqueeze(1)
        found = torch.as_tensor(self.function(rows, 0, query, key), device=self.device)
        return found.expand(self.batch, torch.broadcast_shapes(query.shape, key.shape)[-1])

    def _window(self) -> int | None:
        """The distance at which every key is hidden, which is `local_size`, or one more where that is still seen."""
        if self.local_size is None:
            return None
        for distance in (self.local_size, self.local_size + 1):
            query = self._indices(self.first_query, self.queries)
            query = query[query - distance >= self.first_key]
            if not len(query):
                return None
            if not bool(self._sees(query, query - distance).any()):
                return distance
        return None

    def _cut(self, starts: Tensor, is_real: Tensor) -> Layout:
        """A segment between each two starts, as far as its tokens are real; key rows may go on behind the queries."""
        segments = []
        for row, (begun, runs) in enumerate(zip(starts.tolist(), runs_of(is_real), strict=True)):
            for first, last in runs:
                last = min(last, self.queries)
                edges = [first, *(at for at in range(first + 1, last) if begun[at]), last]
                for start, end in pairwise(edges):
                    segments.append(
                        Segment(row * self.queries + start, end - start, row * self.keys + start, end - start)
                    )
        return Layout(self.batch, self.queries, self.keys, tuple(segments))

    def _check(self, sequence: Tensor, causal: bool, window: int | None) -> None:
        """Compare what was found with the function, for every query at its sequence's start and at some random keys.

        Args:
            sequence: (B, Lq) number of the sequence in its row.
            causal: as found.
            window: as found.
        """
        query = self._indices(self.first_query, self.queries).expand(self.batch, -1)
        generator = torch.Generator().manual_seed(self.queries)
        for place in range(_PLACES):
            drawn = torch.rand(self.batch, self.queries, generator=generator).to(self.device)
            last = query if causal else torch.full_like(query, self.first_query + self.queries - 1)
            reach = last - self.first_key + 1
            key = self.first_key + (drawn * reach).long() if place else self._first_of(sequence)
            expected = torch.ones_like(key, dtype=torch.bool)
            if bool(sequence.any()):
                expected = sequence == sequence.gather(1, key - self.first_query)
            if window is not None:
                expected = expected & ((query - key).abs() < window)
            if not torch.equal(self._sees(query, key), expected):
                raise ModelError("the model hides tokens in a way that our layouts cannot describe", hint=_HINT)

    def _first_of(self, sequence: Tensor) -> Tensor:
        """Index of the first token of each query's sequence: (B, Lq)."""
        if not bool(sequence.any()):
            return torch.full_like(sequence, self.first_key)
        is_first = torch.nn.functional.pad(sequence.diff(dim=1) > 0, (1, 0), value=True)
        places = self._indices(0, self.queries).expand(self.batch, -1)
        return self.first_query + torch.where(is_first, places, 0).cummax(1).values
