"""Groups of short segments: how they are split, and what half precision loses."""

from __future__ import annotations

import pytest
import torch

from rlhf_cli.attention.backends import library, short_segments
from rlhf_cli.attention.layout import Layout
from rlhf_cli.attention.registry import attention

LENGTHS = [48, 70, 24, 46, 45, 3, 69, 53]


@pytest.mark.parametrize(
    ("sizes", "free", "expected"),
    [
        ([], 0, []),
        ([(5, 5)], 0, [[0]]),
        ([(5, 5), (5, 5), (5, 5), (50, 50)], 0, [[0, 1, 2], [3]]),
        ([(5, 5), (5, 5), (5, 5), (50, 50)], 10_000, [[0, 1, 2, 3]]),
        ([(1, 40), (2, 1), (3, 1)], 0, [[0], [1, 2]]),  # the padding of keys counts too
        ([(10, 10), (20, 20), (40, 40), (80, 80)], 0, [[0, 1], [2, 3]]),
    ],
)
def test_a_group_has_at_most_as_much_padding_as_work(sizes, free, expected, monkeypatch):
    monkeypatch.setattr(short_segments, "FREE_PADDING", free)
    assert [list(part) for part in short_segments.split_by_size(sizes)] == expected


def test_each_row_is_in_one_slot_and_no_padding_is_read():
    layout = Layout.tree([(4, [3, 1, 5]), (2, [2])])
    plan = short_segments.Plan(layout, causal=True)
    query = torch.arange(17.0).view(1, 1, 17, 1)
    slots = plan.filled(query, 1, of_queries=True)
    torch.testing.assert_close(
        plan.summed(slots, (1, 1, 17, 1), of_queries=True)[0, 0, 1:].count_nonzero(), torch.tensor(16)
    )
    for group, part in zip(plan.groups, slots, strict=True):
        assert part.shape == (group.size, group.queries, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_a_call_per_segment(dtype, monkeypatch):
    layout = Layout.tree([(30, LENGTHS), (12, [5])])
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 9, layout.query_length, 64), *[(1, 3, layout.key_length, 64)] * 2]
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    weights = torch.randn(shapes[0], generator=generator)

    def found(precision: torch.dtype, backend: str) -> list[torch.Tensor]:
        leaves = [value.to(precision).requires_grad_() for value in values]
        output = attention(*leaves, layout, causal=True, backend=backend).output
        return [output.detach(), *torch.autograd.grad((output.double() * weights).sum(), leaves)]

    def errors() -> list[float]:
        pairs = zip(found(dtype, "torch"), exact, strict=True)
        return [float((mine.double() - theirs).norm() / theirs.norm()) for mine, theirs in pairs]

    exact = found(torch.float64, "reference")
    grouped = errors()
    monkeypatch.setattr(library, "GROUPED", {})
    by_segment = errors()
    assert grouped != by_segment  # two ways indeed
    assert all(mine < 1.2 * theirs for mine, theirs in zip(grouped, by_segment, strict=True))
