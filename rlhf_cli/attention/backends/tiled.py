"""The `tiled` backend: FlashAttention in plain PyTorch, with a tiled online softmax and scores recomputed backward.

Algorithm: FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithms 1 and 2, with the running maximum of Milakov and
           Gimelshein 2018 (arXiv:1805.02867).
Memory:    linear in length; one tile of scores, QUERY_TILE x KEY_TILE for the heads of one batch row, exists at a time.
Precision: float32, or float64 for float64 inputs; output in the dtype of the inputs.
Saved:     inputs, output and log-sum-exp of every row.
Oracle:    backends/reference.py.

This is a readable version of the Triton kernels: each loop below corresponds to a loop there. It runs on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_cli.attention.contract import AttentionOutput, Backend
from rlhf_cli.attention.layout import Layout
from rlhf_cli.precision import autocast

QUERY_TILE = 256
KEY_TILE = 512


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> AttentionOutput:
    """Compute attention with memory linear in length; see `contract`."""
    rules = Rules(layout, scale, causal, window, softcap)
    return AttentionOutput(*_Tiled.apply(query, key, value, sinks, bias, rules))


@dataclass(frozen=True)
class Rules:
    """Arguments of a call besides its tensors; see `contract.AttentionFunction`."""

    layout: Layout
    scale: float
    causal: bool
    window: int | None
    softcap: float | None


class KeyTile(NamedTuple):
    """Key rows that a query tile processes at once.

    Attributes:
        start, end: range of rows in the batch row.
        position: position of the first row in its sequence.
        is_whole: every query of the query tile sees all of these keys.
    """

    start: int
    end: int
    position: int
    is_whole: bool


class QueryTile(NamedTuple):
    """Query rows of one segment with their key tiles.

    Attributes:
        row: index of the batch row.
        start, end: range of rows in the batch row.
        position: position of the first row in its sequence.
        keys: key tiles visible to at least one of the queries.
    """

    row: int
    start: int
    end: int
    position: int
    keys: tuple[KeyTile, ...]


def query_tiles(rules: Rules) -> Iterator[QueryTile]:
    """Cut every segment into tiles. A query tile sees the keys of its segment's ancestors and its own."""
    layout = rules.layout
    for number, segment in enumerate(layout.segments):
        chain = (*layout.ancestors[number], number)
        row, first = divmod(segment.query_start, max(layout.query_length, 1))
        begin = layout.offsets[number] + segment.key_length - segment.query_length
        for done in range(0, segment.query_length, QUERY_TILE):
            end = min(done + QUERY_TILE, segment.query_length)
            keys = tuple(tile for part in chain for tile in _key_tiles(rules, part, begin + done, begin + end))
            yield QueryTile(row, first + done, first + end, begin + done, keys)


def _key_tiles(rules: Rules, part: int, low: int, high: int) -> Iterator[KeyTile]:
    """Tiles of a segment's keys that are visible to any query at positions `low` to `high` - 1."""
    segment, offset = rules.layout.segments[part], rules.layout.offsets[part]
    first = segment.key_start % max(rules.layout.key_length, 1)
    begin, end = 0, segment.key_length
    if rules.causal:
        end = min(end, high - offset)
    if rules.window is not None:
        begin = max(begin, low - offset - rules.window + 1)
        end = min(end, high - offset + rules.window - 1)
    for done in range(begin, end, KEY_TILE):
        stop = min(done + KEY_TILE, end)
        position, last = offset + done, offset + stop - 1
        is_whole = not rules.causal or last <= low
        if rules.window is not None:
            is_whole = is_whole and high - 1 - position < rules.window and last - low < rules.window
        yield KeyTile(first + done, first + stop, position, is_whole)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, bias: Tensor | None, rules: Rules
    ) -> tuple[Tensor, Tensor]:
        batch, heads, length, _ = query.shape
        dtype = torch.promote_types(query.dtype, torch.float32)
        output = query.new_zeros(batch, length, heads, value.shape[-1]).transpose(1, 2)
        logsumexp = torch.full((batch, heads, length), -torch.inf, dtype=dtype, device=query.device)
        call = _Call(query, key, value, bias, rules, dtype)
        for tile in query_tiles(rules):
            rows = slice(tile.start, tile.end)
            output[tile.row, :, rows], logsumexp[tile.row, :, rows] = _forward_tile(call, tile, sinks)
        context.save_for_backward(query, key, value, sinks, bias, output, logsumexp)
        context.rules = rules
        return output, logsumexp

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with autocast(gradients[0].device, torch.float32):  # accumulate in full precision
            return _gradients_of(context, gradients)


def _gradients_of(context: Any, gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    query, key, value, sinks, bias, output, logsumexp = context.saved_tensors
    call = _Call(query, key, value, bias, context.rules, logsumexp.dtype)
    found = _Gradients.zeros(query, key, value, sinks, bias if context.needs_input_grad[4] else None)
    for tile in query_tiles(context.rules):
        rows = slice(tile.start, tile.end)
        saved = (output[tile.row, :, rows], logsumexp[tile.row, :, rows])
        upstream = (gradients[0][tile.row, :, rows], gradients[1][tile.row, :, rows])
        _backward_tile(call, tile, saved, upstream, sinks, found)
    return (*found.cast(query, key, value, sinks, bias), None)


@dataclass(frozen=True)
class _Call:
    """The tensors of a call, read tile by tile. The R = H / G query heads of a key head share one matrix product.

    Shapes: G key heads, R query heads per key head, Tq and Tk rows per tile.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    rules: Rules
    dtype: torch.dtype

    @property
    def groups(self) -> tuple[int, int]:
        """G and R."""
        return self.key.shape[1], self.query.shape[1] // self.key.shape[1]

    def queries(self, tile: QueryTile) -> Tensor:
        """(G, R * Tq, D)."""
        return self.grouped(self.query[tile.row, :, tile.start : tile.end])

    def grouped(self, rows: Tensor) -> Tensor:
        """Reshape (H, Tq, X) to (G, R * Tq, X)."""
        return rows.to(self.dtype).reshape(self.groups[0], -1, rows.shape[-1])

    def keys(self, tile: QueryTile, part: KeyTile) -> tuple[Tensor, Tensor]:
        """Keys (G, Tk, D) and values (G, Tk, Dv)."""
        rows = slice(part.start, part.end)
        return self.key[tile.row, :, rows].to(self.dtype), self.value[tile.row, :, rows].to(self.dtype)

    def scores(self, tile: QueryTile, part: KeyTile, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores (G, R * Tq, Tk), -inf where hidden, and the derivative of the soft cap (None without a cap)."""
        scores, slope = (q @ k.transpose(-1, -2)).mul_(self.rules.scale), None
        if self.rules.softcap is not None:
            bounded = scores.div_(self.rules.softcap).tanh_()
            slope = 1 - bounded.square()
            scores = bounded * self.rules.softcap
        each = scores.view(*self.groups, tile.end - tile.start, part.end - part.start)
        if self.bias is not None:
            bias = bias_of(self.bias, tile, part)
            each += bias.view(*self.groups, *bias.shape[1:]) if bias.shape[0] > 1 else bias
        if not part.is_whole:
            each.masked_fill_(self._hidden(tile, part), -torch.inf)
        return scores, slope

    def _hidden(self, tile: QueryTile, part: KeyTile) -> Tensor:
        """True where a key is hidden from a query: (Tq, Tk)."""
        device, rules = self.query.device, self.rules
        query_at = torch.arange(tile.end - tile.start, device=device).unsqueeze(1) + tile.position
        key_at = torch.arange(part.end - part.start, device=device) + part.position
        hidden = torch.zeros((), dtype=torch.bool, device=device)
        if rules.causal:
            hidden = hidden | (key_at > query_at)
        if rules.window is not None:
            hidden = hidden | ((query_at - key_at).abs() >= rules.window)
        return hidden


def bias_of(bias: Tensor, tile: QueryTile, part: KeyTile) -> Tensor:
    """Return the part of a bias (B|1, H|1, Lq|1, Lk|1) that belongs to a tile, as a view: (H|1, Tq|1, Tk|1)."""
    row = bias[tile.row if bias.shape[0] > 1 else 0]
    row = row[:, tile.start : tile.end] if bias.shape[2] > 1 else row
    return row[:, :, part.start : part.end] if bias.shape[3] > 1 else row


def _forward_tile(call: _Call, tile: QueryTile, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output (H, Tq, Dv) and log-sum-exp (H, Tq) of one query tile: algorithm 1, lines 6 to 15."""
    q = call.queries(tile)
    largest = torch.full_like(q[..., 0], -torch.inf)
    total = torch.zeros_like(largest)
    summed = q.new_zeros(*q.shape[:2], call.value.shape[-1])
    for part in tile.keys:
        k, v = call.keys(tile, part)
        scores, _ = call.scores(tile, part, q, k)
        new_largest = torch.maximum(largest, scores.amax(-1))
        shift = new_largest.masked_fill(torch.isneginf(new_largest), 0.0)  # -inf - -inf would be NaN
        weights = scores.sub_(shift.unsqueeze(-1)).exp_()
        shrink = (largest - shift).exp()
        total = total * shrink + weights.sum(-1)
        summed.mul_(shrink.unsqueeze(-1)).baddbmm_(weights, v)
        largest = new_largest
    if sinks is not None:
        sink = sinks.to(q.dtype).repeat_interleave(tile.end - tile.start).view_as(largest)
        new_largest = torch.maximum(largest, sink)
        shift = new_largest.masked_fill(torch.isneginf(new_largest), 0.0)
        shrink = (largest - shift).exp()
        total = total * shrink + (sink - shift).exp()
        summed, largest = summed * shrink.unsqueeze(-1), new_largest
    heads = call.query.shape[1]
    output = summed / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    logsumexp = largest + total.log()
    return output.view(heads, -1, output.shape[-1]).to(call.query.dtype), logsumexp.view(heads, -1)


@dataclass(frozen=True)
class _Gradients:
    """Accumulators of the gradients, in the precision of the sums."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None
    bias: Tensor | None

    @staticmethod
    def zeros(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, bias: Tensor | None) -> _Gradients:
        def empty(tensor: Tensor | None) -> Any:
            return None if tensor is None else torch.zeros_like(tensor, dtype=_sum_dtype(tensor))

        return _Gradients(*map(empty, (query, key, value, sinks, bias)))

    def cast(self, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Convert to the dtypes of the inputs; None for inputs that are None."""
        mine = (self.query, self.key, self.value, self.sinks, self.bias)
        return tuple(
            None if gradient is None or tensor is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(mine, inputs, strict=True)
        )


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _backward_tile(
    call: _Call,
    tile: QueryTile,
    saved: tuple[Tensor, Tensor],
    upstream: tuple[Tensor, Tensor],
    sinks: Tensor | None,
    into: _Gradients,
) -> None:
    """Add the gradients of one query tile: algorithm 2, extended by the gradient of the log-sum-exp.

    With weights P, dP = dO V^T and D = rowsum(dO o O), the gradient of the scores is dS = P o (dP - D + dL).

    Args:
        call: inputs of the call.
        tile: the query tile.
        saved: output (H, Tq, Dv) and log-sum-exp (H, Tq) of the forward pass.
        upstream: their gradients dO and dL.
        sinks: (H,) or None.
        into: accumulators to add to.
    """
    q, d_output = call.queries(tile), call.grouped(upstream[0])
    logsumexp = saved[1].reshape(q.shape[:2])
    finite = logsumexp.masked_fill(torch.isneginf(logsumexp), torch.inf)  # weights are 0 in rows without visible keys
    less = (d_output * call.grouped(saved[0])).sum(-1) - upstream[1].to(call.dtype).reshape(q.shape[:2])
    less = less.masked_fill(torch.isneginf(logsumexp), 0.0)
    d_query = torch.zeros_like(q)
    for part in tile.keys:
        k, v = call.keys(tile, part)
        scores, slope = call.scores(tile, part, q, k)
        weights = scores.sub_(finite.unsqueeze(-1)).exp_()
        rows = slice(part.start, part.end)
        into.value[tile.row, :, rows] += weights.transpose(-1, -2) @ d_output
        d_scores = (d_output @ v.transpose(-1, -2)).sub_(less.unsqueeze(-1)).mul_(weights)
        if into.bias is not None:
            each = d_scores.view(call.query.shape[1], tile.end - tile.start, part.end - part.start)
            target = bias_of(into.bias, tile, part)
            target += each.sum_to_size(target.shape)
        if slope is not None:
            d_scores.mul_(slope)
        d_scores.mul_(call.rules.scale)
        d_query.baddbmm_(d_scores, k)
        into.key[tile.row, :, rows] += d_scores.transpose(-1, -2) @ q
    heads = call.query.shape[1]
    into.query[tile.row, :, tile.start : tile.end] = d_query.view(heads, -1, d_query.shape[-1])
    if into.sinks is not None and sinks is not None:
        shares = (sinks.to(call.dtype).unsqueeze(1) - finite.view(heads, -1)).exp()
        into.sinks.sub_((shares * less.view(heads, -1)).sum(-1))


BACKEND = Backend(
    "tiled",
    "FlashAttention in plain PyTorch, with memory linear in length",
    attend,
    missing=lambda: None,
    unsupported=lambda request: None,
)
