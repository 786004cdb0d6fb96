"""Group sequences by shared prefix: a group [P; R1; ...; RK] reads the prefix P once instead of K times.

In a causal model the hidden states at the tokens of P depend on P only, so every Rk sees the same states as after its
own copy of P. `Layout.tree` describes the visibility and the positions. A sequence that shares no prefix is a group of
its own; a batch of such sequences is a packed batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_cli.attention.layout import Layout


class TreePath(NamedTuple):
    """Rows of one sequence: the prefix of its group, then its own tokens.

    Attributes:
        shared_start: first row of the prefix.
        shared_length: tokens of the prefix; 0 in a group of one sequence.
        own_start: first row of its own tokens.
        own_length: number of its own tokens, at least 1.
    """

    shared_start: int
    shared_length: int
    own_start: int
    own_length: int

    def rows(self) -> Tensor:
        """Return the row of each token, in order: (length,)."""
        shared = torch.arange(self.shared_start, self.shared_start + self.shared_length)
        return torch.cat([shared, torch.arange(self.own_start, self.own_start + self.own_length)])

    @property
    def last_row(self) -> int:
        """Row of the last token."""
        return self.own_start + self.own_length - 1


@dataclass(frozen=True, eq=False)
class GroupPlan:
    """Sequences laid out as one row of tokens.

    Attributes:
        ids: token ids of the row.
        layout: the prefix tree; `layout.positions()` are the `position_ids` of the model.
        paths: rows of each sequence, in the order of the input.
    """

    ids: list[int]
    layout: Layout
    paths: tuple[TreePath, ...]

    @property
    def input_ids(self) -> Tensor:
        """Token ids as input of a model: (1, tokens)."""
        return torch.tensor([self.ids])

    @property
    def saved_tokens(self) -> int:
        """Tokens saved compared with one copy of the prefix per sequence."""
        return sum(path.shared_length + path.own_length for path in self.paths) - len(self.ids)


def plan_groups(sequences: Sequence[Sequence[int]]) -> GroupPlan:
    """Group sequences by shared prefix such that the total number of tokens is minimal.

    All members of a group start with its prefix and have at least one token after it, since the last token of a
    sequence needs its own row. Members may come from anywhere in `sequences`. A sequence that shares no prefix is a
    group without a prefix.

    Args:
        sequences: token ids; no sequence is empty.
    """
    assert all(sequences), "a sequence has at least one token"
    order = sorted(range(len(sequences)), key=lambda number: list(sequences[number]))
    rank = {number: position for position, number in enumerate(order)}
    groups = [(shared, sorted(members, key=rank.__getitem__)) for shared, members in _best_groups(sequences)]
    ids: list[int] = []
    shape: list[tuple[int, list[int]]] = []
    paths: dict[int, TreePath] = {}
    for shared, members in sorted(groups, key=lambda group: rank[group[1][0]]):
        start = len(ids)
        ids += sequences[members[0]][:shared]
        for number in members:
            own = sequences[number][shared:]
            paths[number] = TreePath(start, shared, len(ids), len(own))
            ids += own
        lengths = [paths[number].own_length for number in members]
        shape.append((shared, lengths) if shared else (lengths[0], []))
    return GroupPlan(ids, Layout.tree(shape), tuple(paths[number] for number in range(len(sequences))))


class _Grouping(NamedTuple):
    """A grouping of the sequences below a node of the prefix tree.

    Attributes:
        saved: number of tokens saved.
        free: indices of sequences not in a group yet, as nested `_Pair`s; a shorter prefix may still group them.
        groups: (prefix length, members) per group, as nested `_Pair`s.
    """

    saved: int
    free: Any
    groups: Any


_Groupings = dict[int, _Grouping]
"""The best grouping per number of free sequences; omitted if another saves as much with more free sequences."""


def _best_groups(sequences: Sequence[Sequence[int]]) -> list[tuple[int, list[int]]]:
    """Find the optimal groups: (prefix length, members) each.

    Dynamic programming over the prefix tree. Each group belongs to one node. For the nodes above, only the number of
    free sequences below a node matters, so the best groupings of a node follow from those of its children: O(N^2) steps
    for N sequences.
    """
    heads = [list(sequence[:-1]) for sequence in sequences]  # the longest prefix that can be shared
    order = sorted(range(len(sequences)), key=heads.__getitem__)
    found: list[tuple[int, list[int]]] = []
    branch: list[tuple[int, _Groupings]] = []  # unfinished nodes from the root down, with their prefix lengths
    for position, number in enumerate(order):
        done: _Groupings = {1: _Grouping(0, number, None)}
        common = _common_length(heads[number], heads[order[position + 1]]) if position + 1 < len(order) else 0
        while branch and branch[-1][0] > common:
            length, groupings = branch.pop()
            done = _with_group(_joined(groupings, done), length)
        if common == 0:
            best = max(done.values(), key=lambda grouping: grouping.saved)
            found += [(0, [free]) for free in _flat(best.free)]
            found += [(length, list(_flat(members))) for length, members in _flat(best.groups)]
        elif branch and branch[-1][0] == common:
            branch[-1] = (common, _joined(branch[-1][1], done))
        else:
            branch.append((common, done))
    return found


def _joined(one: _Groupings, other: _Groupings) -> _Groupings:
    """Combine the groupings of two sets of sequences."""
    joined: _Groupings = {}
    for first, mine in one.items():
        for second, theirs in other.items():
            saved = mine.saved + theirs.saved
            if first + second not in joined or saved > joined[first + second].saved:
                free, groups = _Pair(mine.free, theirs.free), _Pair(mine.groups, theirs.groups)
                joined[first + second] = _Grouping(saved, free, groups)
    kept: _Groupings = {}
    top = -1
    for count in sorted(joined, reverse=True):
        if joined[count].saved > top:
            kept[count], top = joined[count], joined[count].saved
    return kept


def _with_group(groupings: _Groupings, length: int) -> _Groupings:
    """Add the grouping in which all free sequences share a prefix of `length` tokens."""
    count = max(groupings, key=lambda count: groupings[count].saved + length * (count - 1))
    best = groupings[count]
    saved = best.saved + length * (count - 1)
    if count < 2 or saved <= max(grouping.saved for grouping in groupings.values()):
        return groupings
    return {**groupings, 0: _Grouping(saved, None, _Pair(best.groups, (length, best.free)))}


class _Pair(NamedTuple):
    """Concatenation of two collections, without copying."""

    first: Any
    second: Any


def _flat(collection: Any) -> Iterator[Any]:
    """Iterate over the members of nested pairs, in order."""
    waiting = [collection]
    while waiting:
        top = waiting.pop()
        if isinstance(top, _Pair):
            waiting += [top.second, top.first]
        elif top is not None:
            yield top


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    shorter = min(len(one), len(other))
    return next((index for index in range(shorter) if one[index] != other[index]), shorter)
