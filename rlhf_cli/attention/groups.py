"""Planning shared prefixes: sequences that begin alike are read as one group [P; R1; ...; RK] instead of K times.

A causal model's hidden states at the tokens of P depend on P alone, so reading P once gives every Rk exactly what it
would see behind its own copy of P. Only who sees whom and where positions start again differ, and `Layout.tree` says
both. A sequence that begins like no other is a group of its own, which makes a batch of such sequences a packed one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

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
    """Lay sequences out in groups with a common prefix, which are runs in lexicographic order: those that save most.

    Other groups can save a little more: two sequences on either side of a run are not joined by what all begin with.

    A group shares one prefix, the longest common to all its members that leaves each at least one token of its own:
    only rows of its own tell where a sequence ends. Those that share one may stand anywhere in `sequences`.

    Args:
        sequences: ids, none empty.
    """
    assert all(sequences), "a sequence has at least one token"
    order = sorted(range(len(sequences)), key=lambda number: list(sequences[number]))
    ids: list[int] = []
    shape: list[tuple[int, list[int]]] = []
    paths: dict[int, Path] = {}
    for group, shared in _best_runs([sequences[number] for number in order]):
        members = [order[place] for place in group]
        start = len(ids)
        ids += sequences[members[0]][:shared]
        for number in members:
            own = sequences[number][shared:]
            paths[number] = Path(start, shared, len(ids), len(own))
            ids += own
        lengths = [paths[number].own_length for number in members]
        shape.append((shared, lengths) if shared else (lengths[0], []))
    return GroupPlan(ids, Layout.tree(shape), tuple(paths[number] for number in range(len(sequences))))


def _best_runs(ordered: Sequence[Sequence[int]]) -> list[tuple[range, int]]:
    """Cut sequences in lexicographic order into the runs that save most, each with the tokens its members share.

    In that order a run shares the least that any two neighbours in it do, so the best cut before each place follows
    from the best cuts before the places ahead of it: N^2 steps for N sequences.
    """
    room = [len(sequence) - 1 for sequence in ordered]
    shared = [0, *(_common(*pair) for pair in pairwise(ordered))]
    best = [0]  # tokens saved among the first n sequences
    came_from = [(0, 0)]  # where the last run among them starts, and how many tokens it shares
    for end in range(1, len(ordered) + 1):
        top, choice = best[end - 1], (end - 1, 0)
        common = room[end - 1]
        for start in range(end - 2, -1, -1):
            common = min(common, shared[start + 1], room[start])
            if common == 0:
                break
            saved = best[start] + common * (end - start - 1)
            if saved > top:
                top, choice = saved, (start, common)
        best.append(top)
        came_from.append(choice)
    runs: list[tuple[range, int]] = []
    end = len(ordered)
    while end:
        start, common = came_from[end]
        runs.append((range(start, end), common))
        end = start
    return runs[::-1]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the beginning of both."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)
