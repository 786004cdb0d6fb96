"""Planning shared prefixes: sequences that begin alike are read as one group [P; R1; ...; RK] instead of K times.

A causal model's hidden states at the tokens of P depend on P alone, so reading P once gives every Rk exactly what it
would see behind its own copy of P. Only who sees whom and where positions start again differ, and `Layout.tree` says
both. A sequence that begins like no other is a group of its own, which makes a batch of such sequences a packed one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_cli.attention.layout import Layout


class Path(NamedTuple):
    """Where the tokens of one sequence lie.

    Attributes:
        shared_start: row of its first shared token.
        shared_length: tokens it shares with the other sequences of its group; 0 in a group of one.
        own_start: row of the first token that is its own.
        own_length: tokens of its own, at least 1.
    """

    shared_start: int
    shared_length: int
    own_start: int
    own_length: int

    def rows(self) -> Tensor:
        """Row of each of its tokens, in order: (length,)."""
        shared = torch.arange(self.shared_start, self.shared_start + self.shared_length)
        return torch.cat([shared, torch.arange(self.own_start, self.own_start + self.own_length)])

    @property
    def last_row(self) -> int:
        """Row of its last token."""
        return self.own_start + self.own_length - 1


@dataclass(frozen=True, eq=False)
class GroupPlan:
    """Sequences as one row of tokens.

    Attributes:
        ids: tokens of the row.
        layout: which of them form which sequence; its `positions()` are the model's position_ids.
        paths: where each sequence lies, in the order in which the sequences were given.
    """

    ids: list[int]
    layout: Layout
    paths: tuple[Path, ...]

    @property
    def input_ids(self) -> Tensor:
        """What a model reads: (1, tokens)."""
        return torch.tensor([self.ids])

    @property
    def saved_tokens(self) -> int:
        """Tokens that are read once instead of once a sequence."""
        return sum(path.shared_length + path.own_length for path in self.paths) - len(self.ids)


def plan_groups(sequences: Sequence[Sequence[int]]) -> GroupPlan:
    """Lay sequences out in groups with a common prefix, so that as few tokens are read as any such grouping allows.

    All members of a group begin with its prefix and have at least one token behind it: only a row of its own tells
    where a sequence ends. A sequence is in one group, wherever it stands in `sequences`; one that begins like no other
    is a group of itself, without a prefix.

    Args:
        sequences: ids, none empty.
    """
    assert all(sequences), "a sequence has at least one token"
    rank = {
        number: place for place, number in enumerate(sorted(range(len(sequences)), key=lambda n: list(sequences[n])))
    }
    groups = [(shared, sorted(members, key=rank.__getitem__)) for shared, members in _best_groups(sequences)]
    ids: list[int] = []
    shape: list[tuple[int, list[int]]] = []
    paths: dict[int, Path] = {}
    for shared, members in sorted(groups, key=lambda group: rank[group[1][0]]):
        start = len(ids)
        ids += sequences[members[0]][:shared]
        for number in members:
            own = sequences[number][shared:]
            paths[number] = Path(start, shared, len(ids), len(own))
            ids += own
        lengths = [paths[number].own_length for number in members]
        shape.append((shared, lengths) if shared else (lengths[0], []))
    return GroupPlan(ids, Layout.tree(shape), tuple(paths[number] for number in range(len(sequences))))


class _Choice(NamedTuple):
    """A way to group the sequences below a node of the tree of prefixes.

    Attributes:
        saved: tokens.
        free: sequences in no group, which a shorter prefix may still join: a pair of such, a number, or None.
        groups: tokens shared and members; a pair of such, or None.
    """

    saved: int
    free: Any
    groups: Any


_Choices = dict[int, _Choice]
"""The best way for each number of sequences that are left free, unless more of them can be free at no loss."""


def _best_groups(sequences: Sequence[Sequence[int]]) -> list[tuple[int, list[int]]]:
    """Tokens shared and members of each group.

    Prefixes form a tree, and a group belongs to one node of it. Below a node all that matters to those above is how
    many sequences are left free, so its best choices follow from those of its children: N^2 steps for N sequences.
    """
    heads = [list(sequence[:-1]) for sequence in sequences]  # what can be shared at most
    order = sorted(range(len(sequences)), key=heads.__getitem__)
    found: list[tuple[int, list[int]]] = []
    branch: list[tuple[int, _Choices]] = []  # nodes from the root down that are not complete, with their prefix lengths
    for place, number in enumerate(order):
        done: _Choices = {1: _Choice(0, number, None)}
        common = _common(heads[number], heads[order[place + 1]]) if place + 1 < len(order) else 0
        while branch and branch[-1][0] > common:
            length, choices = branch.pop()
            done = _with_group(_joined(choices, done), length)
        if common == 0:
            best = max(done.values(), key=lambda choice: choice.saved)
            found += [(0, [free]) for free in _flat(best.free)]
            found += [(length, list(_flat(members))) for length, members in _flat(best.groups)]
        elif branch and branch[-1][0] == common:
            branch[-1] = (common, _joined(branch[-1][1], done))
        else:
            branch.append((common, done))
    return found


def _joined(one: _Choices, other: _Choices) -> _Choices:
    """Choices for the sequences of both."""
    joined: _Choices = {}
    for first, mine in one.items():
        for second, theirs in other.items():
            saved = mine.saved + theirs.saved
            if first + second not in joined or saved > joined[first + second].saved:
                free, groups = _Pair(mine.free, theirs.free), _Pair(mine.groups, theirs.groups)
                joined[first + second] = _Choice(saved, free, groups)
    kept: _Choices = {}
    top = -1
    for count in sorted(joined, reverse=True):
        if joined[count].saved > top:
            kept[count], top = joined[count], joined[count].saved
    return kept


def _with_group(choices: _Choices, length: int) -> _Choices:
    """Choices with one more: all that are free share `length` tokens here. Whoever joins a group joins the deepest."""
    count = max(choices, key=lambda count: choices[count].saved + length * (count - 1))
    best = choices[count]
    saved = best.saved + length * (count - 1)
    if count < 2 or saved <= max(choice.saved for choice in choices.values()):
        return choices
    return {**choices, 0: _Choice(saved, None, _Pair(best.groups, (length, best.free)))}


class _Pair(NamedTuple):
    """Two collections as one, without copying either."""

    first: Any
    second: Any


def _flat(collection: Any) -> Iterator[Any]:
    """Members of nested pairs, in order."""
    waiting = [collection]
    while waiting:
        top = waiting.pop()
        if isinstance(top, _Pair):
            waiting += [top.second, top.first]
        elif top is not None:
            yield top


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the beginning of both."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)
