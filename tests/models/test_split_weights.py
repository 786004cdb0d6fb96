"""Weights in two halves: nothing is lost, and a model computes with them as autocast does with float32 weights."""

from __future__ import annotations

import pytest
import torch

from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.split_weights import (
    join,
    join_weights,
    low_bits,
    restore,
    round_weights,
    split,
    split_weights,
    stored,
)
from rlhf_cli.precision import autocast


def numbers() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(1 << 16, generator=generator) * torch.logspace(-38, 37, 1 << 16)
    ties = torch.tensor([1.00390625, -1.00390625, 1.01171875, 1e-40, -0.0, 0.0, torch.inf, -torch.inf])
    return torch.cat([many, ties])


def test_both_halves_together_are_the_float32_number():
    weight = numbers()
    high, low = split(weight)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join(high, low).view(torch.int32), weight.view(torch.int32))
    nan = torch.tensor([torch.nan, -torch.nan]).view(torch.int32).bitwise_or(0xFFFF).view(torch.float32)
    assert join(*split(nan)).isnan().all()


def test_the_upper_half_is_the_nearest_bfloat16_number():
    weight = numbers()[:-2].double()
    high = split(weight.float())[0].double()
    nearest = weight.float().to(torch.bfloat16).double()
    assert torch.equal((high - weight).abs(), (nearest - weight).abs())
    assert split(torch.tensor([1.00390625]))[0].item() == 1.0078125  # 1 is as near, and even


@pytest.fixture(params=["tiny_llama", "tiny_gpt2", "tiny_t5"])
def pair(request):
    """The same model twice, in float32."""
    path = str(request.getfixturevalue(request.param))
    return [load_policy(ModelSource(path)).requires_grad_(True) for _ in range(2)]


def losses(model) -> list[torch.Tensor]:
    """The loss of two micro-batches, under autocast to bfloat16."""
    found = []
    for start in (3, 9):
        ids = torch.arange(start, start + 12).view(2, 6)
        with autocast("cpu", torch.bfloat16):
            found.append(model(input_ids=ids, labels=ids).loss.float())
        found[-1].backward()
    return found


def test_a_split_model_computes_and_learns_as_under_autocast(pair):
    plain, halves = pair
    split_weights(halves)
    assert any(low_bits(weight) is not None for weight in halves.parameters())
    assert [one.item() for one in losses(plain)] == [one.item() for one in losses(halves)]
    for (name, expected), (_, weight) in zip(plain.named_parameters(), halves.named_parameters(), strict=True):
        if expected.grad is None:
            assert weight.grad is None
            continue
        assert weight.grad.dtype == torch.float32
        assert torch.equal(weight.grad, expected.grad), name


def test_a_frozen_model_is_rounded_as_the_trained_one(pair):
    frozen, halves = pair
    round_weights(frozen)
    split_weights(halves)
    for expected, weight in zip(frozen.parameters(), halves.parameters(), strict=True):
        assert expected.dtype == weight.dtype
        assert torch.equal(expected, weight)
    assert not [weight for weight in frozen.parameters() if low_bits(weight) is not None]


def test_embeddings_norms_and_the_vocabulary_keep_float32(pair):
    _, halves = pair
    split_weights(halves)
    for module in (halves.get_input_embeddings(), halves.get_output_embeddings()):
        assert module.weight.dtype == torch.float32
    assert all(weight.dtype == torch.float32 for weight in halves.parameters() if weight.dim() < 2)


def test_joining_gives_the_float32_weights_back(pair):
    plain, halves = pair
    split_weights(halves)
    losses(halves)
    join_weights(halves)
    for expected, weight in zip(plain.parameters(), halves.parameters(), strict=True):
        assert weight.dtype == torch.float32
        assert low_bits(weight) is None
        assert torch.equal(expected, weight)
    halves.zero_grad()
    losses(halves)  # gradients have the dtype of the weights again


def test_a_checkpoint_holds_both_halves(pair):
    plain, halves = pair
    split_weights(halves)
    state = {name: tensor.clone() for name, tensor in stored(halves.named_parameters()).items()}
    with torch.no_grad():
        for weight in halves.parameters():
            weight.add_(1.0)
            if (low := low_bits(weight)) is not None:
                low.zero_()
    restore(stored(halves.named_parameters()), state)
    join_weights(halves)
    for expected, weight in zip(plain.parameters(), halves.parameters(), strict=True):
        assert torch.equal(expected, weight)


@pytest.mark.parametrize("was_split", [True, False])
def test_a_checkpoint_of_split_weights_is_read_into_whole_ones_and_the_reverse(pair, was_split: bool):
    """As a run does that goes on with another `model.sharding`: sharded weights are never split."""
    plain, halves = pair
    split_weights(halves)
    source, target = (halves, plain) if was_split else (plain, halves)
    expected = {name: weight.clone() for name, weight in plain.named_parameters()}
    state = {name: tensor.clone() for name, tensor in stored(source.named_parameters()).items()}
    with torch.no_grad():
        for tensor in stored(target.named_parameters()).values():
            tensor.zero_()
    restore(stored(target.named_parameters()), state)
    join_weights(halves)
    for name, weight in target.named_parameters():
        assert torch.equal(expected[name], weight)
