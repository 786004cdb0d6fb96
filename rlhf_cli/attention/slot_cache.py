"""A key-value cache of rows that differ in length, enter and leave: one slot per row, written in place.

    slot 0   p p p p p c c c . . .        p: keys of the prompt     c: of the completion     .: not written, or stale
    slot 1   p p c . . . . . . . .
    slot 2   p p p p p p c c c c .        every row has its own length and is written at it

Rows are aligned on the left, so position and column of a key are equal, no row has padding in front, and nothing is
copied per token. Live rows are slots 0 to n - 1. A row that leaves is replaced by the last live one: one row is copied.
The capacity grows in blocks.

A model reads prompts packed in one row, without padding; `read` keeps their keys and values, and `enter` copies each
prompt into as many slots as it has completions. In `step` the model reads one token per live row.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from rlhf_cli.attention.backends.library import equation

BLOCK = 128
"""Tokens by which the capacity grows."""
_ALIGNMENT = 8
"""Columns that attention reads are a multiple of this, which CUDA's kernels want of a mask."""
_SHARE_OF_GROWTH = 8


class Packed(NamedTuple):
    """Keys and values of prompts that were read in one row: per layer (1, G, tokens, D) and (1, G, tokens, Dv)."""

    keys: list[Tensor]
    values: list[Tensor]


class SlotCache(Cache):
    """Keys and values of at most `slots` rows; see the module's docstring.

    Pass it to a model as its cache, and as `attention_layout` too in a step.

    Args:
        slots: most rows at a time.
        device: of the model.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        # Layers refer to the cache weakly, so that its memory is free as soon as sampling has ended.
        layer = partial(_SlotLayer, weakref.proxy(self))
        super().__init__(layer_class_to_replicate=layer)  # pyright: ignore[reportArgumentType]
        self._slots, self._capacity = slots, 0
        self._host_lengths: list[int] = []  # of the live rows; the same as `_lengths`, readable without waiting
        self._lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self._rows = torch.arange(slots, device=device)
        self._columns = torch.arange(0, device=device)
        self._packed: Packed | None = None  # of the pass that reads prompts
        self._masks: dict[int | None, Tensor] = {}  # of this step, per window

    @property
    def live(self) -> int:
        """Number of live rows."""
        return len(self._host_lengths)

    @property
    def longest(self) -> int:
        """Length of the longest row with the token of a step."""
        return max(self._host_lengths) + 1

    @property
    def positions(self) -> Tensor:
        """Position of the next token of every live row: (n, 1)."""
        return self._lengths[: self.live, None]

    @contextmanager
    def read(self) -> Iterator[Packed]:
        """Inside the context the model reads prompts packed in one row; what is yielded has their keys and values
        then."""
        self._packed = Packed([], [])
        try:
            yield self._packed
        finally:
            self._packed = None

    def enter(self, prompt: Packed, start: int, length: int, count: int) -> None:
        """Put `length` tokens from `start` of what was read into the next `count` slots."""
        first, last = self.live, self.live + count
        self._host_lengths += [length] * count
        self._lengths[first:last] = length
        self._reserve(prompt)
        for layer, keys, values in zip(self._slot_layers, prompt.keys, prompt.values, strict=True):
            layer.keys[first:last, :, :length] = keys[:, :, start : start + length]
            layer.values[first:last, :, :length] = values[:, :, start : start + length]

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop all other live rows.

        Args:
            rows: live rows, ascending.

        Returns:
            The row that each live row was before.
        """
        count, kept = len(rows), set(rows)
        order = list(range(count))
        holes = [row for row in order if row not in kept]
        for hole, row in zip(holes, [row for row in rows if row >= count], strict=True):
            length = self._host_lengths[hole] = self._host_lengths[row]
            self._lengths[hole] = self._lengths[row]
            order[hole] = row
            for layer in self._slot_layers:
                layer.keys[hole, :, :length] = layer.keys[row, :, :length]
                layer.values[hole, :, :length] = layer.values[row, :, :length]
        del self._host_lengths[count:]
        return order

    @contextmanager
    def step(self) -> Iterator[None]:
        """Inside the context the model reads one token per live row, at `positions`."""
        self._reserve(None)
        self._masks.clear()
        yield
        self._lengths[: self.live] += 1
        self._host_lengths = [length + 1 for length in self._host_lengths]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Compute attention of one query per live row, as `contract` defines it: (n, 1, H, Dv).

        Query heads that share a key head are rows of one product, so that keys and values are not repeated.

        Args:
            query: (n, H, 1, D).
            key, value: (n, G, columns, D), (n, G, columns, Dv), from `update`.
            scale, window, softcap, sinks: as in `contract`.
        """
        count, heads, _, size = query.shape
        query, mask = query.to(key.dtype), self._mask(window)
        if softcap is not None or sinks is not None:
            factor = size**-0.5 if scale is None else scale
            # In float32, as the kernels that score: a soft cap of bfloat16 scores is off by up to 1/16 of a nat.
            with torch.autocast(query.device.type, enabled=False):
                output = equation(query.float(), key.float(), value.float(), mask, factor, softcap, sinks)
            output = output.to(value.dtype)
        else:
            grouped = query.reshape(count, key.shape[1], -1, size)
            output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
        return output.reshape(count, 1, heads, value.shape[-1])

    @property
    def _width(self) -> int:
        """Columns that the live rows need in a step."""
        return -(-self.longest // _ALIGNMENT) * _ALIGNMENT

    def _mask(self, window: int | None) -> Tensor:
        """True where the next token of a live row sees a column: (n, 1, 1, columns)."""
        if window not in self._masks:
            columns, at = self._columns[: self._width], self.positions
            sees = columns <= at
            if window is not None:
                sees &= columns > at - window
            self._masks[window] = sees[:, None, None]
        return self._masks[window]

    @property
    def _slot_layers(self) -> list[_SlotLayer]:
        return self.layers  # pyright: ignore[reportReturnType]

    def _reserve(self, like: Packed | None) -> None:
        """Make room for one more token of every live row."""
        if self._width <= self._capacity:
            return
        grown = self._width + self._capacity // _SHARE_OF_GROWTH
        self._capacity = -(-grown // BLOCK) * BLOCK
        self._columns = torch.arange(self._capacity, device=self._columns.device)
        for index, layer in enumerate(self._slot_layers):
            if not layer.is_initialized:
                assert like is not None, "prompts enter before the first step"
                layer.lazy_initialization(like.keys[index], like.values[index])
            layer.keys, layer.values = self._grown(layer.keys), self._grown(layer.values)

    def _grown(self, tensor: Tensor) -> Tensor:
        # Zeros: what was never written has weight 0, and 0 x NaN is NaN.
        grown = tensor.new_zeros(self._slots, tensor.shape[1], self._capacity, tensor.shape[3])
        grown[:, :, : tensor.shape[2]] = tensor
        return grown


class _SlotLayer(CacheLayerMixin):
    """One layer of a `SlotCache`: keys (slots, G, capacity, D), values (slots, G, capacity, Dv)."""

    keys: Tensor
    values: Tensor

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take head counts, head sizes and dtypes from the first keys and values."""
        slots = self._cache._slots
        self.keys = key_states.new_zeros(slots, key_states.shape[1], 0, key_states.shape[3])
        self.values = value_states.new_zeros(slots, value_states.shape[1], 0, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keep keys and values of prompts, or write one token per live row; return what attention reads."""
        cache = self._cache
        device = key_states.device.type
        # Attention would cast all of them, at every token.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else key_states.dtype
        key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if cache._packed is not None:
            cache._packed.keys.append(key_states)
            cache._packed.values.append(value_states)
            return key_states, value_states
        rows, at, width = cache._rows[: cache.live], cache._lengths[: cache.live], cache._width
        self.keys[rows, :, at] = key_states[:, :, 0]
        self.values[rows, :, at] = value_states[:, :, 0]
        return self.keys[: cache.live, :, :width], self.values[: cache.live, :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns and the first one; masks are ours, so nobody should ask."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return 0: rows differ in length, and models are given positions."""
        return 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1
