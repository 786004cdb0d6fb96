"""Convert transformers' mask functions to layouts.

transformers describes visibility by a function of indices, f(batch row, head, query, key), composed of parts: causal, a
window, chunks, packed sequences. Materializing such a mask takes memory quadratic in the length. This module evaluates
the function along a few diagonals instead, which determines every mask that is a layout, and at random keys, which
detects masks that are not.
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

_PROBES = 8  # keys per query at which the layout is checked, besides the diagonals
_HINT = "rerun with `--attention sdpa`"


class Visibility(NamedTuple):
    """A mask in the terms of `contract`.

    Attributes:
        layout: the sequences of the batch.
        causal: keys after the query are hidden.
        window: keys at this distance or more are hidden; None: no window.
    """

    layout: Layout
    causal: bool
    window: int | None


def padded_layout(is_real: Tensor, query_length: int, query_offset: int) -> Layout:
    """Build `Layout.padded`, or `Layout.dense` if nothing is padding.

    Args:
        is_real: (B, Lk) True on real keys, on the CPU.
        query_length: Lq.
        query_offset: key row of the first query.

    Raises:
        ModelError: padding lies between real tokens.
    """
    batch, keys = is_real.shape
    if query_offset + query_length == keys and bool(is_real.all()):
        return Layout.dense(batch, query_length, keys)
    try:
        return Layout.padded(is_real, query_length=query_length, query_offset=query_offset)
    except ValueError as error:
        raise ModelError(str(error), hint="pad each row on one side only, or rerun with `--attention sdpa`") from None


@dataclass(frozen=True)
class MaskFunction:
    """A mask function of transformers with the range of its indices.

    It is evaluated on the CPU: every check of a result on a GPU would wait for the device.

    Attributes:
        function: f(b, head, i, j), True where query i of batch row b sees key j; takes tensors of indices.
        batch: B.
        first_query, queries: index of the first query, and Lq.
        first_key, keys: index of the first key, and Lk.
        local_size: window or chunk size of the function, if it has one.
    """

    function: Callable[..., Any]
    batch: int
    first_query: int
    queries: int
    first_key: int
    keys: int
    local_size: int | None

    def visibility(self, is_real: Tensor) -> Visibility:
        """Convert the function and a padding mask.

        Args:
            is_real: (B, Lk) True on real keys, on the CPU.

        Raises:
            ModelError: the mask is not a layout.
        """
        offset = self.first_query - self.first_key
        if self.queries == 1:  # one row of the mask is the whole mask
            seen = self._sees(self._indices(self.first_query, 1).unsqueeze(1), self._indices(self.first_key, self.keys))
            return Visibility(padded_layout(is_real & seen, 1, offset), True, None)
        later = self._indices(self.first_query + 1, self.queries - 1)
        behind = self._sees(later - 1, later)
        starts = torch.nn.functional.pad(~self._sees(later, later - 1), (1, 0))
        causal, window = not bool(behind.any()), self._window()
        if not causal and not bool(behind.all()):
            raise ModelError(
                "the model lets only some tokens attend to the next one, which attention layouts cannot express",
                hint=_HINT,
            )
        if not bool(starts.any()):
            layout = padded_layout(is_real, self.queries, offset)
        elif offset == 0:
            layout = self._cut(starts, is_real)
        else:
            raise ModelError("packed or chunked sequences cannot be continued from a cache", hint=_HINT)
        self._check(starts.cumsum(1), causal, window)
        return Visibility(layout, causal, window)

    def _indices(self, first: int, count: int) -> Tensor:
        return torch.arange(first, first + count)

    def _sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Evaluate the function on indices that broadcast to (B, n): (B, n) bool."""
        rows = torch.arange(self.batch).unsqueeze(1)
        found = torch.as_tensor(self.function(rows, 0, query, key), device="cpu")
        return found.expand(self.batch, torch.broadcast_shapes(query.shape, key.shape)[-1])

    def _window(self) -> int | None:
        """The window: `local_size`, or `local_size` + 1 if keys at that distance are visible; None if neither."""
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
        """One segment between two consecutive starts, restricted to real tokens; keys may outnumber queries."""
        segments = []
        for row, (begins, runs) in enumerate(zip(starts.tolist(), runs_of(is_real), strict=True)):
            for first, last in runs:
                last = min(last, self.queries)
                edges = [first, *(column for column in range(first + 1, last) if begins[column]), last]
                for start, end in pairwise(edges):
                    segments.append(
                        Segment(row * self.queries + start, end - start, row * self.keys + start, end - start)
                    )
        return Layout(self.batch, self.queries, self.keys, tuple(segments))

    def _check(self, sequence: Tensor, causal: bool, window: int | None) -> None:
        """Check the result against the function: per query at the first key of its sequence and at random keys.

        Args:
            sequence: (B, Lq) index of the sequence within its batch row.
            causal: of the result.
            window: of the result.

        Raises:
            ModelError: the function and the result disagree.
        """
        query = self._indices(self.first_query, self.queries).expand(self.batch, -1)
        generator = torch.Generator().manual_seed(self.queries)
        for probe in range(_PROBES):
            drawn = torch.rand(self.batch, self.queries, generator=generator)
            last = query if causal else torch.full_like(query, self.first_query + self.queries - 1)
            reach = last - self.first_key + 1
            key = self.first_key + (drawn * reach).long() if probe else self._first_of(sequence)
            expected = torch.ones_like(key, dtype=torch.bool)
            if bool(sequence.any()):
                expected = sequence == sequence.gather(1, key - self.first_query)
            if window is not None:
                expected = expected & ((query - key).abs() < window)
            if not torch.equal(self._sees(query, key), expected):
                raise ModelError("the model hides tokens in a way that attention layouts cannot express", hint=_HINT)

    def _first_of(self, sequence: Tensor) -> Tensor:
        """Index of the first token of each query's sequence: (B, Lq)."""
        if not bool(sequence.any()):
            return torch.full_like(sequence, self.first_key)
        is_first = torch.nn.functional.pad(sequence.diff(dim=1) > 0, (1, 0), value=True)
        columns = self._indices(0, self.queries).expand(self.batch, -1)
        return self.first_query + torch.where(is_first, columns, 0).cummax(1).values
