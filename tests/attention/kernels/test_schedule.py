"""Tiles cover every row once, the longest come first, and a layout builds its tables once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from rlhf_cli.attention.kernels import schedule
from rlhf_cli.attention.layout import Layout
from tests.attention.kernels.cases import LAYOUTS

CPU = torch.device("cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 7])
def test_every_row_is_in_one_tile(layout, window):
    found = LAYOUTS[layout]()
    for tiles, length in (
        (schedule.query_tiles(found, 16, CPU, causal=True, window=window), "query_length"),
        (schedule.key_tiles(found, 16, CPU, causal=True, window=window), "key_length"),
    ):
        expected = Counter(
            (number, first)
            for number, segment in enumerate(found.segments)
            for first in range(0, getattr(segment, length), 16)
        )
        assert Counter(map(tuple, tiles.tolist())) == expected


def test_the_tile_with_most_to_visit_comes_first():
    layout = Layout.packed([[20, 50]])
    queries = schedule.query_tiles(layout, 16, CPU, causal=True, window=None).tolist()
    assert queries == [[1, 48], [1, 32], [1, 16], [0, 16], [0, 0], [1, 0]]
    keys = schedule.key_tiles(layout, 16, CPU, causal=True, window=None).tolist()
    assert keys == [[1, 0], [1, 16], [0, 0], [1, 32], [0, 16], [1, 48]]


def test_a_prompts_keys_count_the_queries_of_all_its_answers():
    layout = Layout.tree([(16, [30, 30])])
    assert schedule.key_tiles(layout, 16, CPU, causal=True, window=None).tolist()[0] == [0, 0]
    assert schedule.query_tiles(layout, 16, CPU, causal=True, window=None).tolist()[-1] == [0, 0]


def test_a_window_bounds_what_a_tile_visits():
    layout = Layout.packed([[64, 40]])
    assert schedule.query_tiles(layout, 16, CPU, causal=True, window=1).tolist()[:4] == [
        [0, 16],
        [0, 32],
        [0, 48],
        [1, 16],
    ]


def test_rows_count_inside_their_batch_row_and_positions_run_on_from_the_prompt():
    layout = Layout.packed([[3, 2], [4]])
    table = dict(zip(schedule.COLUMNS, schedule.tables(layout, CPU).segments.T.tolist(), strict=True))
    assert table["query_batch"] == table["key_batch"] == [0, 0, 1]
    assert table["query_row"] == table["key_row"] == [0, 3, 0]
    tree = schedule.tables(Layout.tree([(3, [2, 2])]), CPU)
    table = dict(zip(schedule.COLUMNS, tree.segments.T.tolist(), strict=True))
    assert table["key_position"] == [0, 3, 3]
    assert table["subtree_end"] == [3, 2, 3]
    chains = [
        tree.chains[start:end].tolist() for start, end in zip(table["chain_start"], table["chain_end"], strict=True)
    ]
    assert chains == [[0], [0, 1], [0, 2]]


def test_queries_end_where_keys_end():
    table = schedule.tables(Layout.dense(1, 2, 5), CPU).segments
    assert table[0, schedule.COLUMNS.index("query_position")] == 3


def test_a_layout_builds_its_tables_once():
    layout = Layout.dense(1, 5)
    assert schedule.tables(layout, CPU).segments is schedule.tables(layout, CPU).segments
    one = schedule.query_tiles(layout, 16, CPU, causal=True, window=None)
    assert one is schedule.query_tiles(layout, 16, CPU, causal=True, window=None)
    assert one is not schedule.query_tiles(layout, 32, CPU, causal=True, window=None)


def test_what_is_covered_needs_no_zeros():
    assert schedule.covers_queries(Layout.packed([[2, 3]]))
    assert not schedule.covers_queries(Layout.packed([[2, 3], [4]]))
    assert schedule.covers_keys(Layout.dense(1, 2, 5))
    assert not schedule.covers_keys(Layout.cross(2, torch.tensor([[True, False]])))
