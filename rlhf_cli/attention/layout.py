"""Batch layouts: which rows of a batch form a sequence, and which keys each query sees.

Tensors are (B, H, L, D), as in Hugging Face models. A "row" is one token of the batch, with flat index b * L + l; a
"batch row" is one of the B rows of tokens. A segment is a contiguous run of query rows with a contiguous run of key
rows, each within one batch row. Layouts are lists of segments:

    dense         one segment per batch row, filling it
    padded        one segment per batch row, not filling it: padding on the left, the right or both
    packed        several segments per batch row
    cached        fewer query rows than key rows; the last query is at the position of the last key
    cross         query rows and key rows belong to different tensors of sequences
    prefix tree   a segment may have a parent; it then sees the keys of all its ancestors too. K completions of one
                  prompt are [P; R1; ...; RK], where P is the parent of every R

Rows outside all segments are padding: no query sees them, their output is 0 and they receive no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

NO_PARENT = -1


class Segment(NamedTuple):
    """A run of query rows with the run of key rows of the same tokens.

    Attributes:
        query_start: flat index of the first query row.
        query_length: number of query rows; 0 for keys without queries (the prompt in decoding).
        key_start: flat index of the first key row.
        key_length: number of key rows.
        parent: index of the segment that comes before this one in its sequence; -1: none.
    """

    query_start: int
    query_length: int
    key_start: int
    key_length: int
    parent: int = NO_PARENT


@dataclass(frozen=True, eq=False)
class Layout:
    """The segments of one batch.

    Attributes:
        batch: B, number of batch rows.
        query_length: Lq, query rows per batch row.
        key_length: Lk, key rows per batch row.
        segments: in depth-first order, each parent before its children, so that a subtree is a range of indices.

    Raises:
        ValueError: segments overlap, leave their batch row, or are out of order.
    """

    batch: int
    query_length: int
    key_length: int
    segments: tuple[Segment, ...]

    @staticmethod
    def dense(batch: int, query_length: int, key_length: int | None = None) -> Layout:
        """No padding. `key_length` differs from `query_length` in cross-attention and in generation with a cache."""
        return _dense(batch, query_length, query_length if key_length is None else key_length)

    @staticmethod
    def padded(is_real: Tensor, *, query_length: int | None = None, query_offset: int = 0) -> Layout:
        """Build a layout from a padding mask.

        Args:
            is_real: (B, Lk) bool, True on real tokens; these are contiguous in each batch row.
            query_length: Lq; None: the same as Lk.
            query_offset: key row of the first query row, in generation with a cache.

        Raises:
            ValueError: padding lies between real tokens of a batch row.
        """
        batch, keys = is_real.shape
        queries = keys if query_length is None else query_length
        segments = []
        for row, runs in enumerate(runs_of(is_real)):
            if len(runs) > 1:
                raise ValueError(f"row {row} of the attention mask has padding between real tokens")
            start, end = runs[0] if runs else (0, 0)
            end = min(end, query_offset + queries)
            start = min(start, end)
            first, last = max(start, query_offset), max(end, query_offset)
            segments.append(
                Segment(row * queries + first - query_offset, last - first, row * keys + start, end - start)
            )
        layout = Layout(batch, queries, keys, tuple(segments))
        # fast path, called at every decoding step: one query sees all real keys
        if queries == 1 and not is_real.is_cuda:
            sees = (is_real & (torch.arange(keys, device=is_real.device) <= query_offset)).unsqueeze(1)
            sees = sees & sees[:, :, query_offset : query_offset + 1]
            layout._masks.update({(causal, None, str(is_real.device)): sees for causal in (True, False)})
        return layout

    @staticmethod
    def cross(query_length: int, is_real_key: Tensor) -> Layout:
        """Build a layout in which every query of a batch row sees the real keys of that row.

        Args:
            query_length: Lq.
            is_real_key: (B, Lk) bool; real keys are contiguous in each batch row.

        Raises:
            ValueError: padding lies between real keys of a batch row.
        """
        batch, keys = is_real_key.shape
        lengths = Layout.padded(is_real_key).segments
        segments = tuple(
            Segment(row * query_length, query_length, lengths[row].key_start, lengths[row].key_length)
            for row in range(batch)
        )
        return Layout(batch, query_length, keys, segments)

    @staticmethod
    def packed(rows: Sequence[Sequence[int]], width: int | None = None) -> Layout:
        """Build a layout of concatenated sequences.

        Args:
            rows: per batch row the lengths of its sequences, in tokens.
            width: L; None: length of the longest row. Shorter rows are padded on the right.
        """
        width = max(map(sum, rows)) if width is None else width
        segments = []
        for row, lengths in enumerate(rows):
            at = row * width
            for length in lengths:
                segments.append(Segment(at, length, at, length))
                at += length
        return Layout(len(rows), width, width, tuple(segments))

    @staticmethod
    def bounded(queries: Sequence[int], keys: Sequence[int], query_length: int, key_length: int) -> Layout:
        """Build a packed layout of one batch row from sequence boundaries (`cu_seq_lens`).

        Args:
            queries: S + 1 boundaries of the query rows.
            keys: S + 1 boundaries of the key rows.
            query_length: Lq.
            key_length: Lk.
        """
        segments = tuple(
            Segment(query, next_query - query, key, next_key - key)
            for (query, next_query), (key, next_key) in zip(pairwise(queries), pairwise(keys), strict=True)
        )
        return Layout(1, query_length, key_length, segments)

    @staticmethod
    def tree(groups: Sequence[tuple[int, Sequence[int]]]) -> Layout:
        """Build a layout of prompts with their completions in one batch row: [P; R1; ...; RK; P'; R'1; ...].

        Args:
            groups: per group the length of the prompt and the lengths of its completions, in tokens.
        """
        segments: list[Segment] = []
        at = 0
        for prompt, completions in groups:
            parent = len(segments)
            segments.append(Segment(at, prompt, at, prompt))
            at += prompt
            for completion in completions:
                segments.append(Segment(at, completion, at, completion, parent))
                at += completion
        return Layout(1, at, at, tuple(segments))

    def __post_init__(self) -> None:
        free = [0] * self.batch  # kernels write query rows without bounds checks
        open_ancestors: list[int] = []
        for number, segment in enumerate(self.segments):
            row, first = divmod(segment.query_start, max(self.query_length, 1))
            key_row, first_key = divmod(segment.key_start, max(self.key_length, 1))
            if segment.query_length and not (0 <= row < self.batch and free[row] <= first):
                raise ValueError(f"segment {number} overlaps another segment or lies outside the batch: {segment}")
            if segment.query_length < 0 or first + segment.query_length > max(self.query_length, first):
                raise ValueError(f"the queries of segment {number} extend beyond their batch row: {segment}")
            if segment.key_length and not 0 <= key_row < self.batch:
                raise ValueError(f"the keys of segment {number} lie outside the batch: {segment}")
            if segment.key_length < 0 or first_key + segment.key_length > max(self.key_length, first_key):
                raise ValueError(f"the keys of segment {number} extend beyond their batch row: {segment}")
            if segment.query_length:
                free[row] = first + segment.query_length
            while open_ancestors and open_ancestors[-1] != segment.parent:
                open_ancestors.pop()
            if segment.parent != NO_PARENT and not open_ancestors:
                raise ValueError(f"segment {number} does not follow its parent in depth-first order: {segment}")
            open_ancestors.append(number)

    @cached_property
    def is_dense(self) -> bool:
        """Whether one segment fills every batch row."""
        return len(self.segments) == self.batch and all(
            segment == (row * self.query_length, self.query_length, row * self.key_length, self.key_length, NO_PARENT)
            for row, segment in enumerate(self.segments)
        )

    @cached_property
    def is_tree(self) -> bool:
        """Whether any segment has a parent."""
        return any(segment.parent != NO_PARENT for segment in self.segments)

    @cached_property
    def ancestors(self) -> tuple[tuple[int, ...], ...]:
        """Ancestors of each segment, root first, parent last."""
        found: list[tuple[int, ...]] = []
        for segment in self.segments:
            found.append(() if segment.parent == NO_PARENT else (*found[segment.parent], segment.parent))
        return tuple(found)

    @cached_property
    def subtree_ends(self) -> tuple[int, ...]:
        """End of the subtree of each segment: segment s and its descendants are `range(s, end)`."""
        ends = [number + 1 for number in range(len(self.segments))]
        for number in reversed(range(len(self.segments))):
            if (parent := self.segments[number].parent) != NO_PARENT:
                ends[parent] = max(ends[parent], ends[number])
        return tuple(ends)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Position of the first key of each segment: the number of keys of its ancestors."""
        return tuple(sum(self.segments[number].key_length for number in chain) for chain in self.ancestors)

    @cached_property
    def longest(self) -> int:
        """Length of the longest sequence in keys, including ancestors."""
        lengths = (offset + segment.key_length for offset, segment in zip(self.offsets, self.segments, strict=True))
        return max(lengths, default=0)

    @cached_property
    def real_tokens(self) -> int:
        """Number of query rows that are not padding."""
        return sum(segment.query_length for segment in self.segments)

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Position of each query row in its sequence, 0 on padding: (B, Lq) int64, the `position_ids` of a model."""
        return self._on_device("positions", device, lambda: self._query_rows[1].clamp(min=0))

    def is_real(self, device: torch.device | str = "cpu") -> Tensor:
        """True on query rows that are not padding: (B, Lq) bool."""
        return self._on_device("is_real", device, lambda: self._query_rows[0] >= 0)

    def is_real_key(self, device: torch.device | str = "cpu") -> Tensor:
        """True on key rows that are not padding: (B, Lk) bool."""
        return self._on_device("is_real_key", device, lambda: self._key_rows[0] >= 0)

    def visible(self, *, causal: bool, window: int | None = None, device: torch.device | str = "cpu") -> Tensor:
        """True where a query sees a key: (B, Lq, Lk) bool. This is the definition that every backend implements.

        A query at position i sees the key at position j of its own segment and of the ancestors of its segment;
        with `causal` only if j <= i, with `window` only if |i - j| < window. The last query of a segment is at the
        position of its last key.
        """
        key = (causal, window, str(device))
        if key not in self._masks:
            self._masks[key] = self._visible(causal, window).to(device)
        return self._masks[key]

    def _visible(self, causal: bool, window: int | None) -> Tensor:
        if self.is_dense and self.batch > 1:
            one = Layout.dense(1, self.query_length, self.key_length)
            return one._visible(causal, window).expand(self.batch, -1, -1)
        of_query, query_at = (rows.unsqueeze(2) for rows in self._query_rows)  # (B, Lq, 1)
        of_key, key_at = (rows.unsqueeze(1) for rows in self._key_rows)  # (B, 1, Lk)
        count = len(self.segments)
        sees = torch.eye(count + 1, dtype=torch.bool)
        sees[count, count] = False  # padding has index -1, the last row, and sees nothing
        for number, chain in enumerate(self.ancestors):
            sees[number, list(chain)] = True
        mask = sees[of_query, of_key]
        if causal:
            mask &= key_at <= query_at
        if window is not None:
            mask &= query_at - key_at < window
            mask &= key_at - query_at < window
        return mask

    def _on_device(self, name: str, device: torch.device | str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor of this layout, uploaded once: every layer and every model of a pass asks for it."""
        key = (name, str(device))
        if key not in self._uploaded:
            self._uploaded[key] = make().to(device)
        return self._uploaded[key]

    @cached_property
    def _uploaded(self) -> dict[tuple[str, str], Tensor]:
        return {}

    @cached_property
    def _masks(self) -> dict[tuple[bool, int | None, str], Tensor]:
        return {}

    @cached_property
    def _query_rows(self) -> tuple[Tensor, Tensor]:
        """Segment index and position of every query row: (B, Lq) each, -1 on padding."""
        rows = [(segment.query_start, segment.query_length) for segment in self.segments]
        first = [
            offset + segment.key_length - segment.query_length
            for offset, segment in zip(self.offsets, self.segments, strict=True)
        ]
        return _numbered(rows, first, (self.batch, self.query_length))

    @cached_property
    def _key_rows(self) -> tuple[Tensor, Tensor]:
        """Segment index and position of every key row: (B, Lk) each, -1 on padding."""
        rows = [(segment.key_start, segment.key_length) for segment in self.segments]
        return _numbered(rows, self.offsets, (self.batch, self.key_length))


@lru_cache(maxsize=32)
def _dense(batch: int, queries: int, keys: int) -> Layout:
    segments = tuple(Segment(row * queries, queries, row * keys, keys) for row in range(batch))
    return Layout(batch, queries, keys, segments)


def _numbered(rows: Sequence[tuple[int, int]], first: Sequence[int], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    segment = torch.full((shape[0] * shape[1],), -1)
    position = torch.full_like(segment, -1)
    for number, ((start, length), at) in enumerate(zip(rows, first, strict=True)):
        segment[start : start + length] = number
        position[start : start + length] = torch.arange(at, at + length)
    return segment.view(shape), position.view(shape)


def runs_of(is_real: Tensor) -> list[list[tuple[int, int]]]:
    """Return the runs of True in every row of a (B, L) mask, as (start, end)."""
    edges = torch.nn.functional.pad(is_real.cpu().int(), (1, 1)).diff(dim=1)
    found: list[list[tuple[int, int]]] = [[] for _ in range(is_real.shape[0])]
    starts, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    for (row, start), (_, end) in zip(starts, ends, strict=True):
        found[row].append((start, end))
    return found
