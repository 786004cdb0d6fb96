"""Grouping by shared prefix: every sequence is complete, and no other grouping saves more tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.attention.groups import plan_groups

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6)


def test_a_group_is_its_prompt_followed_by_its_completions():
    plan = plan_groups([[7, 8, 9, 1], [4, 4], [7, 8, 9, 2, 2], [7, 8, 9, 3]])
    assert plan.input_ids.tolist() == [[4, 4, 7, 8, 9, 1, 2, 2, 3]]
    assert plan.layout.positions().tolist() == [[0, 1, 0, 1, 2, 3, 3, 4, 3]]
    assert [path.rows().tolist() for path in plan.paths] == [[2, 3, 4, 5], [0, 1], [2, 3, 4, 6, 7], [2, 3, 4, 8]]
    assert [path.last_row for path in plan.paths] == [5, 1, 7, 8]
    assert plan.saved_tokens == 6


def test_a_sequence_keeps_one_token_of_its_own():
    plan = plan_groups([[5, 6], [5, 6], [5, 6, 7]])
    assert plan.input_ids.tolist() == [[5, 6, 6, 6, 7]]
    assert len({path.last_row for path in plan.paths}) == 3
    assert plan_groups([[5], [5]]).saved_tokens == 0


def test_sequences_without_a_shared_prefix_are_packed():
    plan = plan_groups([[1, 2], [3], [2, 2, 2]])
    assert not plan.layout.is_tree
    assert plan.saved_tokens == 0
    assert plan.layout.positions().tolist() == [[0, 1, 0, 1, 2, 0]]


def test_a_short_prefix_of_all_does_not_split_longer_prefixes_of_some():
    """A template starts every prompt; sharing its two tokens among all four would lose the six of each pair."""
    template = [1, 2]
    first, second = [*template, 3, 4, 5, 6], [*template, 7, 8, 9, 10]
    plan = plan_groups([[*first, 20], [*second, 21], [*first, 22], [*second, 23]])
    assert plan.saved_tokens == 12


def test_an_empty_sequence_is_refused():
    with pytest.raises(AssertionError, match="at least one token"):
        plan_groups([[1], []])


@given(SEQUENCES)
@settings(max_examples=300, deadline=None)
def test_each_sequence_has_its_own_rows_and_positions(sequences: list[list[int]]):
    plan = plan_groups(sequences)
    positions = plan.layout.positions()[0]
    visible = plan.layout.visible(causal=True)[0]
    for path, ids in zip(plan.paths, sequences, strict=True):
        rows = path.rows()
        assert plan.input_ids[0, rows].tolist() == ids
        assert positions[rows].tolist() == list(range(len(ids)))
        for at, row in enumerate(rows):
            assert visible[row].nonzero().squeeze(1).tolist() == sorted(rows[: at + 1].tolist())
    own = [row for path in plan.paths for row in range(path.own_start, path.own_start + path.own_length)]
    assert len(own) == len(set(own))


def partitions(items: list[list[int]]) -> Iterator[list[list[list[int]]]]:
    """All partitions of a list into groups."""
    if not items:
        yield []
        return
    first, *others = items
    for groups in partitions(others):
        yield [[first], *groups]
        for number, group in enumerate(groups):
            yield [*groups[:number], [first, *group], *groups[number + 1 :]]


def saving(sequences: list[list[int]]) -> int:
    shared = 0
    while all(len(ids) > shared + 1 and ids[shared] == sequences[0][shared] for ids in sequences):
        shared += 1
    return shared * (len(sequences) - 1)


@given(SEQUENCES)
@settings(max_examples=300, deadline=None)
def test_no_other_grouping_saves_more(sequences: list[list[int]]):
    best = max(sum(map(saving, groups)) for groups in partitions(sequences))
    assert plan_groups(sequences).saved_tokens == best


def test_a_group_may_enclose_another():
    inner = [1, 3, 5, 5, 5, 5]
    plan = plan_groups([[1, 2, 2], [*inner, 4, 4], [*inner, 7, 7], [1, 9, 9]])
    assert sorted((path.shared_start, path.shared_length) for path in plan.paths) == [(0, 1)] * 2 + [(5, 6)] * 2
