"""Layouts: which keys each query sees, by hand."""

from __future__ import annotations

import pytest
import torch

from rlhf_cli.attention.layout import Layout, Segment


def picture(layout: Layout, *, causal: bool = True, window: int | None = None) -> list[list[str]]:
    """`x` where a query (row) sees a key (column)."""
    mask = layout.visible(causal=causal, window=window)
    return [["".join("x" if seen else "." for seen in query) for query in row] for row in mask.tolist()]


def test_dense_causal_is_a_triangle():
    assert picture(Layout.dense(2, 3)) == [["x..", "xx.", "xxx"]] * 2


def test_fewer_queries_than_keys_end_together():
    assert picture(Layout.dense(1, 2, 4)) == [["xxx.", "xxxx"]]


def test_not_causal_sees_all():
    assert picture(Layout.dense(1, 2, 3), causal=False) == [["xxx", "xxx"]]


def test_padding_neither_sees_nor_is_seen():
    left_right_none_all = torch.tensor([[0, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    layout = Layout.padded(left_right_none_all)
    assert picture(layout) == [
        ["...", ".x.", ".xx"],
        ["x..", "xx.", "..."],
        ["x..", "xx.", "xxx"],
        ["...", "...", "..."],
    ]
    assert layout.positions().tolist() == [[0, 0, 1], [0, 1, 0], [0, 1, 2], [0, 0, 0]]
    assert layout.real_tokens == 7


def test_padding_between_tokens_is_refused():
    with pytest.raises(ValueError, match="row 1 of the attention mask has padding between real tokens"):
        Layout.padded(torch.tensor([[1, 1, 1], [1, 0, 1]], dtype=torch.bool))


def test_a_static_cache_shows_past_tokens_but_no_empty_slot():
    # Left padding in row 0; four of six slots are written, the query is the fourth.
    slots = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    layout = Layout.padded(slots, query_length=1, query_offset=3)
    assert picture(layout) == [[".xxx.."], ["xxxx.."]]
    assert layout.positions().tolist() == [[2], [3]]


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_the_fast_path_of_decoding_equals_the_general_mask(offset):
    rows = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
    layout = Layout.padded(rows, query_length=1, query_offset=offset)
    anew = Layout(layout.batch, layout.query_length, layout.key_length, layout.segments)
    assert picture(layout) == picture(anew)
    assert picture(layout, causal=False) == picture(anew, causal=False)


def test_a_chunk_of_a_prompt_keeps_its_queries_positions():
    layout = Layout.padded(torch.ones(1, 5, dtype=torch.bool), query_length=2, query_offset=3)
    assert picture(layout) == [["xxxx.", "xxxxx"]]


def test_packed_sequences_do_not_see_each_other():
    layout = Layout.packed([[2, 1], [1]])
    assert picture(layout) == [["x..", "xx.", "..x"], ["x..", "...", "..."]]
    assert picture(layout, causal=False) == [["xx.", "xx.", "..x"], ["x..", "...", "..."]]


def test_empty_segments_are_harmless():
    assert picture(Layout.packed([[0, 2, 0]])) == [["x.", "xx"]]


def test_cross_attention_sees_the_real_keys():
    layout = Layout.cross(2, torch.tensor([[1, 1, 0]], dtype=torch.bool))
    assert picture(layout, causal=False) == [["xx.", "xx."]]


def test_completions_see_their_prompt_and_themselves():
    layout = Layout.tree([(2, [1, 2]), (1, [1])])
    assert picture(layout) == [
        [
            "x......",
            "xx.....",
            "xxx....",
            "xx.x...",
            "xx.xx..",
            ".....x.",
            ".....xx",
        ]
    ]
    assert layout.positions().tolist() == [[0, 1, 2, 2, 3, 0, 1]]
    assert layout.subtree_ends == (3, 2, 3, 5, 5)
    assert layout.ancestors == ((), (0,), (0,), (), (3,))


def test_a_window_counts_positions_and_not_rows():
    assert picture(Layout.dense(1, 4), window=2) == [["x...", "xx..", ".xx.", "..xx"]]
    assert picture(Layout.dense(1, 3), window=1, causal=False) == [["x..", ".x.", "..x"]]
    # The first token of the last completion is at position 2, directly after the prompt, whatever rows lie between.
    assert picture(Layout.tree([(2, [1, 1])]), window=2) == [["x...", "xx..", ".xx.", ".x.x"]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout.packed([[5, 6]], width=4), "the queries of segment 0 extend beyond their batch row"),
        (lambda: Layout.bounded([0, 5, 9], [0, 5, 9], 8, 8), "the queries of segment 1 extend beyond their batch row"),
        (lambda: Layout.bounded([0, 5, 9], [0, 5], 9, 9), "zip"),
        (lambda: Layout(1, 4, 4, (Segment(0, 3, 0, 3), Segment(2, 2, 2, 2))), "segment 1 overlaps another"),
        (
            lambda: Layout(1, 4, 4, (Segment(4, 1, 0, 1),)),
            "segment 0 overlaps another segment or lies outside the batch",
        ),
        (lambda: Layout(1, 4, 4, (Segment(0, 1, 3, 2),)), "the keys of segment 0 extend beyond their batch row"),
        (lambda: Layout(1, 4, 4, (Segment(0, 1, 4, 1),)), "the keys of segment 0 lie outside the batch"),
        (
            lambda: Layout(1, 4, 4, (Segment(0, 1, 0, 1), Segment(1, 1, 1, 1), Segment(2, 1, 2, 1, 0))),
            "segment 2 does not follow its parent in depth-first order",
        ),
    ],
)
def test_invalid_segments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_layers_ask_for_is_made_once_for_a_device():
    layout = Layout.packed([[2, 1]])
    for ask in (layout.positions, layout.is_real, layout.is_real_key):
        assert ask("cpu") is ask("cpu")
    assert layout.positions("meta").device.type == "meta"
