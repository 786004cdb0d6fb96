"""Orders of training data: whole epochs, new ones each time, and the same for the same seed."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.training.shuffle import EndlessShuffle, shuffled


def test_an_order_depends_on_seed_epoch_and_name():
    base = {"seed": 1, "epoch": 0, "name": "prompts"}
    order = shuffled(20, **base)
    assert sorted(order) == list(range(20))
    assert shuffled(20, **base) == order
    for change in ({"seed": 2}, {"epoch": 1}, {"name": "minibatches"}):
        assert shuffled(20, **base | change) != order


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 6))
@settings(max_examples=50, deadline=None)
def test_slices_concatenate_to_whole_epochs(count: int, size: int, first: int):
    shuffle = EndlessShuffle(count, seed=0, name="prompts")
    walked = [item for step in range(count) for item in shuffle.slice(step * size, (step + 1) * size)]
    for epoch in range(size):
        part = walked[epoch * count : (epoch + 1) * count]
        assert part == shuffled(count, seed=0, epoch=epoch, name="prompts")
    fresh = EndlessShuffle(count, seed=0, name="prompts")
    assert fresh.slice(first * size, (first + 1) * size) == shuffle.slice(first * size, (first + 1) * size)
