"""Which tiles a layout has and where each one's rows are: small int32 tables, built once for a layout and device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_cli.attention.layout import Layout

# Columns of `Tables.segments`.
COLUMNS = (
    "query_batch",
    "query_row",
    "query_length",
    "query_position",
    "key_batch",
    "key_row",
    "key_length",
    "key_position",
    "chain_start",
    "chain_end",
    "subtree_end",
)
# Distances above this cannot occur; a larger window would not fit the kernels' int32.
NO_LIMIT = 2**30


class Tables(NamedTuple):
    """What all kernels read.

    Attributes:
        segments: (S, len(COLUMNS)) int32; rows count inside their batch row, positions are those of the first row.
        chains: int32 segment numbers; `chain_start:chain_end` are a segment's ancestors, the root first, and itself.
    """

    segments: Tensor
    chains: Tensor


def tables(layout: Layout, device: torch.device) -> Tables:
    """The segments of a layout, on a device."""
    cache = _cache(layout)
    key = ("tables", str(device))
    if key not in cache:
        rows, chains = [], []
        for number, segment in enumerate(layout.segments):
            chain = (*layout.ancestors[number], number)
            offset = layout.offsets[number]
            rows.append(
                (
                    *divmod(segment.query_start, max(layout.query_length, 1)),
                    segment.query_length,
                    offset + segment.key_length - segment.query_length,
                    *divmod(segment.key_start, max(layout.key_length, 1)),
                    segment.key_length,
                    offset,
                    len(chains),
                    len(chains) + len(chain),
                    layout.subtree_ends[number],
                )
            )
            chains.extend(chain)
        segments, flat = on_device(device, rows, [(number,) for number in chains])
        cache[key] = Tables(segments, flat.view(-1))
    return cache[key]


def query_tiles(layout: Layout, block: int, device: torch.device, *, causal: bool, window: int | None) -> Tensor:
    """(T, 2) int32: segment and first query of every block of queries, that with most keys to visit first."""
    cache = _cache(layout)
    key = ("queries", block, str(device), causal, window)
    if key not in cache:
        found: list[tuple[int, int, int]] = []
        for number, segment in enumerate(layout.segments):
            keys = layout.offsets[number] + segment.key_length
            for first in range(0, segment.query_length, block):
                last = min(first + block, segment.query_length) - 1
                end = keys - segment.query_length + last + 1 if causal else keys
                found.append((_limited(end, window, block, causal), number, first))
        cache[key] = _longest_first(found, device)
    return cache[key]


def key_tiles(layout: Layout, block: int, device: torch.device, *, causal: bool, window: int | None) -> Tensor:
    """(T, 2) int32: segment and first key of every block of keys, that with most queries to visit first."""
    cache = _cache(layout)
    key = ("keys", block, str(device), causal, window)
    if key not in cache:
        found: list[tuple[int, int, int]] = []
        for number, segment in enumerate(layout.segments):
            subtree = layout.segments[number + 1 : layout.subtree_ends[number]]
            below = sum(descendant.query_length for descendant in subtree)
            for first in range(0, segment.key_length, block):
                hidden = max(first + segment.query_length - segment.key_length, 0) if causal else 0
                own = _limited(segment.query_length - hidden, window, block, causal)
                found.append((below + own, number, first))
        cache[key] = _longest_first(found, device)
    return cache[key]


def covers_queries(layout: Layout) -> bool:
    """Whether every query row is in a segment, so that kernels write all of the output."""
    return layout.real_tokens == layout.batch * layout.query_length


def covers_keys(layout: Layout) -> bool:
    """Whether every key row is in a segment, so that kernels write all of dK and dV."""
    return sum(segment.key_length for segment in layout.segments) == layout.batch * layout.key_length


def _limited(visited: int, window: int | None, block: int, causal: bool) -> int:
    if window is None:
        return visited
    return min(visited, (1 if causal else 2) * window + block)


def _longest_first(found: list[tuple[int, int, int]], device: torch.device) -> Tensor:
    found.sort(key=lambda tile: -tile[0])
    return on_device(device, [tile[1:] for tile in found])[0]


def on_device(device: torch.device, *tables: list[Any]) -> list[Tensor]:
    """Lists of equally long tuples as int32 tensors, by one copy; an empty one has one column.

    Each starts at a multiple of 16 bytes, as Triton likes its pointers.
    """
    flat: list[int] = []
    positions = []
    for table in tables:
        flat.extend([0] * (-len(flat) % 4))
        positions.append(len(flat))
        flat.extend(number for row in table for number in row)
    # A plan is made at every decoded token: from pinned memory the host does not wait until it has arrived.
    is_cuda = device.type == "cuda"
    everything = torch.tensor(flat, dtype=torch.int32, pin_memory=is_cuda).to(device, non_blocking=is_cuda)
    found = []
    for table, at in zip(tables, positions, strict=True):
        width = len(table[0]) if table else 1
        found.append(everything[at : at + len(table) * width].view(len(table), width))
    return found


def _cache(layout: Layout) -> dict:
    return layout.__dict__.setdefault("_kernel_schedules", {})
