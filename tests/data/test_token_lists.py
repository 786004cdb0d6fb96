"""Token ids of a data set take about four bytes each, and read as lists."""

from __future__ import annotations

import tracemalloc

import pytest

from rlhf_cli.data.examples import Example
from rlhf_cli.data.token_lists import TokenLists
from rlhf_cli.models.reward_model.batch import Encoded

LISTS = [[5, 6, 7], [], [128_255], [2**31 - 1, 0]]


def test_lists_are_what_was_added():
    lists = TokenLists(LISTS[:2])
    for ids in LISTS[2:]:
        lists.append(ids)
    assert len(lists) == 4
    assert list(lists) == LISTS
    assert lists[-1] == LISTS[-1]
    assert lists == LISTS
    assert lists != LISTS[:3]
    assert list(lists[1:3]) == LISTS[1:3]
    with pytest.raises(IndexError):
        lists[4]


def test_an_example_reads_as_lists():
    example = Example([1, 2], [3, 4, 5], ((0, 1),), 2)
    assert (example.prompt_ids, example.completion_ids, example.ids) == ([1, 2], [3, 4, 5], [1, 2, 3, 4, 5])
    assert example.is_trained() == [True, False, True, True, True]
    assert (len(example), example.longest_side(False), example.longest_side(True)) == (5, 5, 3)
    assert example == Example([1, 2], [3, 4, 5], ((0, 1),), 2)
    assert example != Example([1], [2, 3, 4, 5], ((0, 1),), 2)
    assert example.prompt_key == Example([1, 2], [9]).prompt_key != Example([1], [2, 9]).prompt_key
    assert not Example([], [1]).prompt_key


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param(lambda ids: Example(ids[:100], ids[100:]), id="demonstration"),
        pytest.param(lambda ids: Encoded(ids, [0] * len(ids)), id="sequence of a reward model"),
        pytest.param(lambda ids: TokenLists([ids]), id="prompt"),
    ],
)
def test_a_token_takes_few_bytes(kept):
    count, length = 200, 300
    tracemalloc.start()
    try:
        found = [kept(list(range(1_000 * number, 1_000 * number + length))) for number in range(count)]
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == count
    assert taken / (count * length) < 7
