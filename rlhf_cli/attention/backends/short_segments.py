"""Attention of many short segments on a CPU: segments of similar lengths are computed together, padded.

Function:  softmax(scale Q K^T) V for each segment, over the keys of its ancestors and its own.
Padding:   segments are sorted by size and split into groups in which padding at most doubles the query-key pairs, or
           adds 20,000 per head. One matrix product then serves a whole group, instead of a dozen small calls per
           segment and layer.
Precision: products take and return the dtype of the inputs; softmax is float32, or float64 for float64.
Backward:  written out, with the weights of the forward pass. Gradients of keys that several segments see are summed
           in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_cli.attention.layout import Layout

FREE_PADDING = 20_000
"""Padded query-key pairs per head that cost less than the calls for another group."""


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float, causal: bool) -> Tensor:
    """Compute attention; see `contract`.

    Every query of a segment has to see a key of it or of its ancestors, unless there are none.
    """
    plans = _PLANS.setdefault(layout, {})
    if causal not in plans:
        plans[causal] = Plan(layout, causal)
    if not plans[causal].groups:
        return query.new_zeros(*query.shape[:3], value.shape[3])
    return _Attention.apply(query, key, value, plans[causal], scale)


@dataclass(frozen=True)
class Group:
    """Segments that are computed together.

    Attributes:
        size: number of segments S.
        queries: query slots per segment.
        keys: key slots per segment.
        is_hidden: (S, 1, queries, keys) bool, True where a query does not see a key.
        is_padding: (S, 1, queries, 1) bool, True in query slots that no query row fills.
    """

    size: int
    queries: int
    keys: int
    is_hidden: Tensor
    is_padding: Tensor


class Plan:
    """Which rows of a batch fill which slots of the groups, and back.

    Attributes:
        groups: in the order of their slots; empty if no query sees a key.
    """

    def __init__(self, layout: Layout, causal: bool) -> None:
        segments, found = layout.segments, []
        for segment, ancestors in zip(segments, layout.ancestors, strict=True):
            chain = (*(segments[number] for number in ancestors), segment)
            keys = [row for part in chain for row in range(part.key_start, part.key_start + part.key_length)]
            if segment.query_length and keys:
                first = segment.query_start
                found.append((list(range(first, first + segment.query_length)), keys))
        found.sort(key=lambda rows: (len(rows[0]), len(rows[1])))
        parts = [found[part.start : part.stop] for part in split_by_size([(len(q), len(k)) for q, k in found])]
        self.groups = [_group([len(q) for q, _ in part], [len(k) for _, k in part], causal) for part in parts]
        self._of_queries = _Slots([[q for q, _ in part] for part in parts], layout.batch * layout.query_length)
        self._of_keys = _Slots([[k for _, k in part] for part in parts], layout.batch * layout.key_length)

    def filled(self, tensor: Tensor, key_heads: int, *, of_queries: bool) -> list[Tensor]:
        """Return the slots of each group, (S G, H / G x slots, D), from the rows of a tensor (B, H, L, D)."""
        batch, heads, length, size = tensor.shape
        slots = self._of_queries if of_queries else self._of_keys
        chosen = tensor.transpose(1, 2).reshape(batch * length, heads * size).index_select(0, slots.rows)
        found = []
        for group, part in zip(self.groups, chosen.split(slots.counts), strict=True):
            split = part.view(group.size, -1, key_heads, heads // key_heads, size).permute(0, 2, 3, 1, 4)
            found.append(split.reshape(group.size * key_heads, -1, size))
        return found

    def summed(self, parts: Sequence[Tensor], shape: Sequence[int], *, of_queries: bool) -> Tensor:
        """Return rows (B, H, L, D), each the sum of its slots in the groups; 0 in rows without slots."""
        batch, heads, length, size = shape
        slots = self._of_queries if of_queries else self._of_keys
        width = heads * size
        found = [
            part.view(group.size, heads, -1, size).transpose(1, 2).reshape(-1, width)
            for group, part in zip(self.groups, parts, strict=True)
        ]
        rows = F.embedding_bag(slots.of_rows, torch.cat(found), slots.starts, mode="sum")
        return rows.view(batch, length, heads, size).transpose(1, 2)


class _Slots:
    """The slots of all groups, for queries or keys.

    Attributes:
        rows: the row of each slot; in slots of padding the first row of their segment.
        counts: number of slots of each group.
        of_rows: the slots of row 0, of row 1, ...
        starts: where those of each row start.
    """

    def __init__(self, groups: Sequence[Sequence[Sequence[int]]], count: int) -> None:
        rows: list[int] = []
        of_rows: list[list[int]] = [[] for _ in range(count)]
        for group in groups:
            width = max(map(len, group))
            for found in group:
                for slot, row in enumerate(found, len(rows)):
                    of_rows[row].append(slot)
                rows += [*found, *[found[0]] * (width - len(found))]
        self.rows, self.counts = torch.tensor(rows), [len(group) * max(map(len, group)) for group in groups]
        self.of_rows = torch.tensor([slot for slots in of_rows for slot in slots])
        self.starts = torch.tensor([0, *map(len, of_rows)])[:-1].cumsum(0)


_PLANS: WeakKeyDictionary[Layout, dict[bool, Plan]] = WeakKeyDictionary()


def split_by_size(sizes: Sequence[tuple[int, int]]) -> list[range]:
    """Split segments, sorted by their numbers of queries and keys, into groups with little padding."""
    found, start, real, widest = [], 0, 0, 0
    for at, (queries, keys) in enumerate(sizes):
        real, widest = real + queries * keys, max(widest, keys)
        padded = (at + 1 - start) * queries * widest
        if at > start and padded - real > max(real, FREE_PADDING):
            found.append(range(start, at))
            start, real, widest = at, queries * keys, keys
    return [*found, range(start, len(sizes))] if sizes else []


def _group(queries: Sequence[int], keys: Sequence[int], causal: bool) -> Group:
    """Build the masks of a group from the lengths of its segments."""
    query, key = torch.arange(max(queries)), torch.arange(max(keys))
    lengths, seen = (torch.tensor(numbers)[:, None] for numbers in (queries, keys))
    # The last query is at the position of the last key. Slots of padding see what the last query sees: a row without
    # any key would be NaN.
    last = seen - lengths + torch.minimum(query, lengths - 1) if causal else (seen - 1).expand(-1, len(query))
    return Group(
        len(queries),
        len(query),
        len(key),
        (key > last[:, :, None])[:, None],
        (query >= lengths)[:, None, :, None],
    )


class _Attention(torch.autograd.Function):
    """(query, key, value, plan, scale) -> output, shapes of `contract`.

    In a group, tensors are (S G, H / G x slots, D): heads that share a key head are rows of one product.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float) -> Tensor:
        """Compute the output; the weights are kept for the backward pass."""
        precise = torch.float64 if query.dtype == torch.float64 else torch.float32
        queries = plan.filled(query, key.shape[1], of_queries=True)
        keys, values = (plan.filled(tensor, key.shape[1], of_queries=False) for tensor in (key, value))
        outputs, kept = [], []
        for group, q, k, v in zip(plan.groups, queries, keys, values, strict=True):
            q.mul_(scale)
            scores = torch.bmm(q, k.transpose(1, 2)).view(group.size, -1, group.queries, group.keys)
            weights = scores.masked_fill_(group.is_hidden, -torch.inf).softmax(-1, dtype=precise)
            outputs.append(torch.bmm(weights.to(v.dtype).view(len(q), -1, group.keys), v))
            kept += [q, k, v, weights] if any(ctx.needs_input_grad) else []
        ctx.save_for_backward(*kept)
        ctx.plan, ctx.scale = plan, scale
        ctx.shapes = query.shape, key.shape, value.shape
        return plan.summed(outputs, (*query.shape[:3], value.shape[3]), of_queries=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Compute the gradients by query, key and value."""
        plan, kept = ctx.plan, iter(ctx.saved_tensors)
        of_query, of_key, of_value = ctx.shapes
        by_query, by_key, by_value = [], [], []
        for group, by_rows in zip(plan.groups, plan.filled(by_output, of_key[1], of_queries=True), strict=True):
            q, k, v, weights = (next(kept) for _ in range(4))
            by_rows.view(group.size, -1, group.queries, of_value[3]).masked_fill_(group.is_padding, 0.0)
            by_value.append(torch.bmm(weights.to(v.dtype).view(len(q), -1, group.keys).transpose(1, 2), by_rows))
            by_weights = torch.bmm(by_rows, v.transpose(1, 2)).view(weights.shape).to(weights.dtype)
            by_scores = torch.ops.aten._softmax_backward_data(by_weights, weights, -1, weights.dtype)
            by_scores = by_scores.to(q.dtype).view(len(q), -1, group.keys)
            by_query.append(torch.bmm(by_scores, k).mul_(ctx.scale))
            by_key.append(torch.bmm(by_scores.transpose(1, 2), q))
        return (
            plan.summed(by_query, of_query, of_queries=True),
            plan.summed(by_key, of_key, of_queries=False),
            plan.summed(by_value, of_value, of_queries=False),
            None,
            None,
        )
