"""Attention of few queries over many keys in Triton, as decoding needs it: keys split, shared prefixes read once.

Algorithm: FlashDecoding (Dao et al. 2023) with Hydragen's shared prefixes (Juravsky et al. 2024, arXiv:2402.05099). A
           run of keys is cut into chunks that different programs read; the rows of a program's tile are all the queries
           that see the run, those of every segment below it, times the query heads of one key head. So K answers read
           their prompt's keys once. A second kernel merges what each query got of its chunks by their log-sum-exps:
           output = sum_c exp(L_c - L) output_c,  L = log(sum_c exp(L_c) + exp(sink)).
Layout:    (B, H, Lq, D), (B, G, Lk, D), (B, G, Lk, Dv), any strides but 1 in the last dimension; output (B, H, Lq, Dv)
           laid out as (B, Lq, H, Dv); log-sum-exp (B, H, Lq).
Precision: inputs float16, bfloat16 or float32, accumulation and partial outputs float32, output as the input.
Saved:     nothing: there is no backward pass.
Oracle:    attention/backends/reference.py; error at most twice torch's at the same dtype.
Tested on: Triton 3.7.1's interpreter (values) and its compiler for sm_90 (no spills); no GPU has run it.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# Triton compiles what stands below: its literals are not Python's.
from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_cli.attention.contract import AttentionOutput, Request
from rlhf_cli.attention.kernels import schedule
from rlhf_cli.attention.kernels.arguments import (
    addressable,
    empty_results,
    on_device_of,
    padded,
    refuse_mixed_dtypes,
    score_rules,
    strides,
)
from rlhf_cli.attention.kernels.device import INTERPRETED, LN_2, LOG2_E, dot, load_tile, row_base, sees, tanh
from rlhf_cli.attention.kernels.launch import Launch
from rlhf_cli.attention.kernels.tiles import Tile
from rlhf_cli.attention.layout import NO_PARENT, Layout

# More queries of a segment than this fill a tile of the forward kernel well enough.
MOST_QUERIES = 16
_WORK_COLUMNS = tl.constexpr(8)
_MEMBER_COLUMNS = tl.constexpr(3)


@triton.jit
def partial_kernel(
    query,
    key,
    value,
    partial,
    partial_lse,
    work,
    members,
    query_b,
    query_h,
    query_l,
    key_b,
    key_h,
    key_l,
    value_b,
    value_h,
    value_l,
    heads,
    score_scale,
    cap,
    window,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Output and log-sum-exp of a tile of rows over one chunk of keys. Grid: (work * heads / GROUP,)."""
    key_heads = heads // GROUP
    key_head = tl.program_id(0) % key_heads
    item = work + tl.program_id(0) // key_heads * _WORK_COLUMNS
    key_batch = tl.load(item)
    key_row = tl.load(item + 1)
    length = tl.load(item + 2)
    key_at = tl.load(item + 3)
    first_member = tl.load(item + 4)
    first_row = tl.load(item + 5)
    end_row = tl.load(item + 6)
    first_slot = tl.load(item + 7)

    rows = first_row + tl.arange(0, ROWS)
    is_row = rows < end_row
    head = key_head * GROUP + rows % GROUP
    member = members + (first_member + rows // GROUP) * _MEMBER_COLUMNS
    batch = tl.load(member, mask=is_row, other=0).to(tl.int64)
    query_row = tl.load(member + 1, mask=is_row, other=0).to(tl.int64)
    query_at = tl.load(member + 2, mask=is_row, other=0)
    columns = tl.arange(0, HEAD_BLOCK)
    query_rows = query + batch * query_b + head.to(tl.int64) * query_h + query_row * query_l
    q_mask = is_row[:, None] & (columns < HEAD_SIZE)[None, :]
    q = tl.load(query_rows[:, None] + columns[None, :], mask=q_mask, other=0.0)
    key_base = row_base(key, key_batch, key_head, key_row, key_b, key_h, key_l)
    value_base = row_base(value, key_batch, key_head, key_row, value_b, value_h, value_l)

    acc = tl.zeros((ROWS, VALUE_BLOCK), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in range(0, length, KEYS):
        k = load_tile(key_base, start, length, key_l, HEAD_SIZE, KEYS, HEAD_BLOCK, True)
        scores = dot(q, tl.trans(k)) * score_scale
        if SOFTCAP:
            scores = cap * tanh(scores)
        keys = start + tl.arange(0, KEYS)
        seen = sees(query_at[:, None], key_at + keys[None, :], window, CAUSAL, WINDOW)
        scores = tl.where(seen & (keys < length)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # -inf - -inf is NaN
        weights = tl.exp2(scores - origin[:, None])
        decay = tl.exp2(peak - origin)
        total = total * decay + tl.sum(weights, 1)
        v = load_tile(value_base, start, length, value_l, VALUE_SIZE, KEYS, VALUE_BLOCK, True)
        acc = acc * decay[:, None] + dot(weights.to(v.dtype), v)
        peak = new_peak

    sees_any = total > 0.0
    divisor = tl.where(sees_any, total, 1.0)
    slot = (first_slot + rows // GROUP).to(tl.int64) * heads + head
    value_columns = tl.arange(0, VALUE_BLOCK)
    targets = partial + slot[:, None] * VALUE_SIZE + value_columns[None, :]
    tl.store(targets, acc / divisor[:, None], mask=is_row[:, None] & (value_columns < VALUE_SIZE)[None, :])
    tl.store(partial_lse + slot, tl.where(sees_any, peak + tl.log2(divisor), float("-inf")), mask=is_row)


@triton.jit
def merge_kernel(
    partial,
    partial_lse,
    sinks,
    output,
    logsumexp,
    members,
    slot_ranges,
    slots,
    output_b,
    output_h,
    output_l,
    heads,
    rows,
    VALUE_SIZE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Output and log-sum-exp of one query and head from those of its chunks. Grid: (queries * heads,)."""
    head = tl.program_id(0) % heads
    number = tl.program_id(0) // heads
    batch = tl.load(members + number * _MEMBER_COLUMNS)
    row = tl.load(members + number * _MEMBER_COLUMNS + 1)
    first = tl.load(slot_ranges + 2 * number)
    last = tl.load(slot_ranges + 2 * number + 1)
    columns = tl.arange(0, VALUE_BLOCK)
    is_column = columns < VALUE_SIZE

    acc = tl.zeros((VALUE_BLOCK,), tl.float32)
    total = tl.zeros((1,), tl.float32)
    peak = tl.full((1,), float("-inf"), tl.float32)
    if SINKS:
        peak = tl.zeros((1,), tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2_E
        total = tl.where(peak == float("-inf"), 0.0, 1.0)
    for start in range(first, last, SLOTS):
        at = start + tl.arange(0, SLOTS)
        slot = tl.load(slots + at, mask=at < last, other=0).to(tl.int64) * heads + head
        lse = tl.load(partial_lse + slot, mask=at < last, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(lse - origin)
        decay = tl.exp2(peak - origin)
        found = tl.load(
            partial + slot[:, None] * VALUE_SIZE + columns[None, :],
            mask=(at < last)[:, None] & is_column[None, :],
            other=0.0,
        )
        total = total * decay + tl.sum(weights, 0)
        acc = acc * decay + tl.sum(weights[:, None] * found, 0)
        peak = new_peak

    sees_any = total > 0.0
    divisor = tl.where(sees_any, total, 1.0)
    output_base = row_base(output, batch, head, row, output_b, output_h, output_l)
    tl.store(output_base + columns, (acc / divisor).to(output.dtype.element_ty), mask=is_column)
    lse_at = (tl.cast(batch, tl.int64) * heads + head) * rows + row + tl.arange(0, 1)
    tl.store(logsumexp + lse_at, tl.where(sees_any, (peak + tl.log2(divisor)) * LN_2, float("-inf")))


class Plan(NamedTuple):
    """Who reads which keys, as int32 tables on the device.

    Attributes:
        work: (W, 8) a tile of rows over a chunk of keys: batch row, first row, length and first position of the keys;
            number of the first query; first and last + 1 of its rows, counted from there with the heads of a query in
            sequence; slot of the first query.
        members: (N, 3) batch row, row and position of each query, segment by segment.
        slot_ranges: (N, 2) where in `slots` those of a query are.
        slots: where the partial outputs of each query are.
        slot_count: how many partial outputs there are.
    """

    work: Tensor
    members: Tensor
    slot_ranges: Tensor
    slots: Tensor
    slot_count: int


def serves(request: Request) -> bool:
    """Whether a call is decoding: no gradient, no bias, and few queries for the keys there are."""
    return not (request.needs_grad or request.has_bias) and _is_decoding(request.layout)


def decode(
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
) -> AttentionOutput:
    """Attention without a gradient. Arguments as in `contract`, but of one dtype.

    Raises:
        UsageError: query, key and value differ in dtype.
    """
    refuse_mixed_dtypes(query, key, value)
    query, key, value = (addressable(tensor.detach()) for tensor in (query, key, value))
    sinks = None if sinks is None else sinks.detach().contiguous()
    rules = {"causal": causal, "window": window}
    with on_device_of(query):
        first, second, found = launches(query, key, value, layout, scale=scale, softcap=softcap, sinks=sinks, **rules)
        first.run()
        second.run()
    return found


def launches(
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
) -> tuple[Launch, Launch, AttentionOutput]:
    """Both kernels with all they need, and the tensors that the second one fills."""
    heads, key_heads, value_size = query.shape[1], key.shape[1], value.shape[-1]
    blocks = padded(query.shape[-1]), padded(value_size)
    size = _tile(_most_rows(layout) * heads // key_heads, max(blocks), query.dtype == torch.float32)
    plan = _plan(layout, query.device, (heads, key_heads), size, causal=causal, window=window)
    shared = {
        "partial": query.new_empty(plan.slot_count, heads, value_size, dtype=torch.float32),
        "partial_lse": query.new_empty(plan.slot_count, heads, dtype=torch.float32),
        "members": plan.members,
        "heads": heads,
        "VALUE_SIZE": value_size,
        "VALUE_BLOCK": blocks[1],
    }
    rules = score_rules(scale, softcap, causal=causal, window=window)
    found = AttentionOutput(*empty_results(query, value, layout))
    first = shared | rules | _reading(query, key, value, plan, size)
    second = shared | _merging(found, sinks, plan)
    return (
        Launch(partial_kernel, len(plan.work) * key_heads, first, size),
        Launch(merge_kernel, len(plan.members) * heads, second, Tile(1, 16, 4, 1)),
        found,
    )


def _reading(query: Tensor, key: Tensor, value: Tensor, plan: Plan, size: Tile) -> dict[str, Any]:
    """What `partial_kernel` takes beside the rules and what both kernels take."""
    return {
        "query": query,
        "key": key,
        "value": value,
        "work": plan.work,
        **strides("query", query),
        **strides("key", key),
        **strides("value", value),
        "GROUP": query.shape[1] // key.shape[1],
        "HEAD_SIZE": query.shape[-1],
        "HEAD_BLOCK": padded(query.shape[-1]),
        "ROWS": size.queries,
        "KEYS": size.keys,
    }


def _merging(found: AttentionOutput, sinks: Tensor | None, plan: Plan) -> dict[str, Any]:
    """What `merge_kernel` takes beside what both kernels take."""
    return {
        "sinks": sinks,
        "output": found.output,
        "logsumexp": found.logsumexp,
        "slot_ranges": plan.slot_ranges,
        "slots": plan.slots,
        **strides("output", found.output),
        "rows": found.output.shape[2],
        "SLOTS": 4 if INTERPRETED else 16,
        "SINKS": sinks is not None,
    }


def _plan(
    layout: Layout, device: torch.device, heads: tuple[int, int], size: Tile, *, causal: bool, window: int | None
) -> Plan:
    """The tables for a layout, built once for all layers of a model."""
    cache: dict[Any, Plan] = layout.__dict__.setdefault("_decode_plans", {})
    key = (str(device), heads, size, causal, window)
    if key not in cache:
        cache[key] = _planned(layout, device, heads, size, causal=causal, window=window)
    return cache[key]


def _planned(
    layout: Layout, device: torch.device, heads: tuple[int, int], size: Tile, *, causal: bool, window: int | None
) -> Plan:
    members, first_member = _members(layout)
    group, key_heads = heads[0] // heads[1], heads[1]
    runs = []  # keys that somebody sees: segment, first and last + 1
    blocks = 0
    for number, segment in enumerate(layout.segments):
        readers = members[first_member[number] : first_member[layout.subtree_ends[number]]]
        start, end = _seen(readers, layout.offsets[number], segment.key_length, causal, window)
        if start < end:
            runs.append((number, start, end))
            blocks += _ceil(end - start, size.keys) * _ceil(len(readers) * group, size.queries) * key_heads
    chunk = size.keys * max(1, _ceil(blocks, _programs(device)))
    work: list[tuple[int, ...]] = []
    slots: list[list[int]] = [[] for _ in members]
    slot = 0
    for number, start, end in runs:
        batch, row = divmod(layout.segments[number].key_start, layout.key_length)
        first, last = first_member[number], first_member[layout.subtree_ends[number]]
        rows = (last - first) * group
        for at in range(start, end, chunk):
            keys = (batch, row + at, min(chunk, end - at), layout.offsets[number] + at)
            for tile in range(0, rows, size.queries):
                work.append((*keys, first, tile, min(tile + size.queries, rows), slot))
            for member in range(first, last):
                slots[member].append(slot + member - first)
            slot += last - first
    ranges, flat = [], []
    for each in slots:
        ranges.append((len(flat), len(flat) + len(each)))
        flat.extend(each)
    return Plan(*schedule.on_device(device, work, members, ranges, [(number,) for number in flat]), slot)  # pyright: ignore


def _members(layout: Layout) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Batch row, row and position of every query, and the number of each segment's first one, with an end."""
    members: list[tuple[int, int, int]] = []
    first = []
    for number, segment in enumerate(layout.segments):
        first.append(len(members))
        batch, row = divmod(segment.query_start, max(layout.query_length, 1))
        position = layout.offsets[number] + segment.key_length - segment.query_length
        members.extend((batch, row + at, position + at) for at in range(segment.query_length))
    return members, [*first, len(members)]


def _seen(
    readers: list[tuple[int, int, int]], key_at: int, length: int, causal: bool, window: int | None
) -> tuple[int, int]:
    """First and last + 1 of `length` keys from position `key_at` on that any of the readers sees."""
    if not readers:
        return 0, 0
    positions = [position for _, _, position in readers]
    start, end = 0, length
    if causal:
        end = min(end, max(positions) + 1 - key_at)
    if window is not None:
        start = max(start, min(positions) - window + 1 - key_at)
        end = min(end, max(positions) + window - key_at)
    return start, end


def _is_decoding(layout: Layout) -> bool:
    cache = layout.__dict__
    if "_is_decoding" not in cache:
        queries = max((segment.query_length for segment in layout.segments), default=0)
        keys = max((segment.key_length for segment in layout.segments), default=0)
        cache["_is_decoding"] = 0 < queries <= MOST_QUERIES and (queries == 1 or keys >= 4 * queries)
    return cache["_is_decoding"]


def _most_rows(layout: Layout) -> int:
    """Queries that share the keys of a segment, at most."""
    cache = layout.__dict__
    if "_most_decode_rows" not in cache:
        _, first = _members(layout)
        cache["_most_decode_rows"] = max(
            (
                first[end] - first[number]
                for number, end in enumerate(layout.subtree_ends)
                if layout.segments[number].parent == NO_PARENT
            ),
            default=0,
        )
    return cache["_most_decode_rows"]


def _tile(rows: int, head_block: int, is_32_bit: bool) -> Tile:
    """Rows and keys of a program; tensor cores take 16 rows or more. Found by compiling, not by measuring."""
    if INTERPRETED:
        return Tile(16, 16, 4, 1)
    rows = min(64, padded(max(rows, 1)))
    if head_block > 128:
        return Tile(16, 16, 8, 2) if is_32_bit else Tile(min(rows, 32), 64, 8, 2)
    return Tile(min(rows, 32), 32, 4, 2) if is_32_bit else Tile(rows, 64, 4, 3)


def _programs(device: torch.device) -> int:
    """How many programs fill the device: two for each of its processors."""
    return 2 * _processors(str(device)) if device.type == "cuda" else 8


@lru_cache(maxsize=16)
def _processors(device: str) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
