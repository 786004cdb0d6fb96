"""AdamW on weights in two halves takes the steps of AdamW on float32 weights."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from rlhf_cli.models.split_weights import LOW, join, low_bits, split
from rlhf_cli.training import adamw
from rlhf_cli.training.adamw import BLOCK, AdamW, EightBitMoments
from rlhf_cli.training.checkpoint.store import optimizer_tensors, restore_optimizer

RATE = 1e-5
"""A step of this size is far below what bfloat16 resolves in a weight of 1."""


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install .[quantized]"
)


def in_halves(weight: torch.Tensor) -> nn.Parameter:
    high, low = split(weight)
    parameter = nn.Parameter(high)
    parameter.grad_dtype = torch.float32
    setattr(parameter, LOW, low)
    return parameter


def whole(parameter: nn.Parameter) -> torch.Tensor:
    low = low_bits(parameter)
    return parameter.detach() if low is None else join(parameter.detach(), low)


def pairs() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(shape, generator=generator) for shape in ((7, 9), (5,)))
    plain = [nn.Parameter(first.clone()), nn.Parameter(second.clone())]
    return plain, [in_halves(first), nn.Parameter(second.clone())]


def take_steps(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for number, weight in enumerate(weights):
            generator = torch.Generator().manual_seed(100 * step + number)
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_steps_are_those_of_float32_weights(monkeypatch):
    monkeypatch.setitem(adamw.PIECE, "cpu", 10)
    plain, halves = pairs()
    start = [weight.detach().clone() for weight in plain]
    take_steps(torch.optim.AdamW(plain, lr=RATE, weight_decay=0.1, fused=True), plain, range(5))
    take_steps(AdamW(halves, lr=RATE, weight_decay=0.1), halves, range(5))
    for before, expected, weight in zip(start, plain, halves, strict=True):
        torch.testing.assert_close(whole(weight), expected, rtol=2e-7, atol=0.0)  # one unit in the last place
        assert (whole(weight) - before).abs().mean() > RATE


def test_a_resumed_optimizer_takes_the_same_steps():
    _, halves = pairs()
    optimizer = AdamW(halves, lr=RATE)
    take_steps(optimizer, halves, range(3))
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, "optimizer").items()}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    again = [in_halves(whole(halves[0])), nn.Parameter(halves[1].detach().clone())]
    take_steps(optimizer, halves, range(3, 6))
    resumed = AdamW(again, lr=RATE)
    restore_optimizer(resumed, tensors, "optimizer")
    take_steps(resumed, again, range(3, 6))
    for expected, weight in zip(halves, again, strict=True):
        assert torch.equal(whole(weight), whole(expected))


def large_and_small() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(90, 70, generator=generator), torch.randn(33, generator=generator)


@needs_bitsandbytes
@pytest.mark.parametrize("is_split", [False, True], ids=["float32 weights", "weights in halves"])
def test_steps_with_8_bit_moments_are_near_those_with_float32_ones(monkeypatch, is_split):
    """6,300 numbers in pieces of 512 and a rest; each step moves a weight by about the rate in either case."""
    monkeypatch.setitem(adamw.PIECE, "cpu", 2 * BLOCK)
    first, second = large_and_small()
    plain = [nn.Parameter(first.clone()), nn.Parameter(second.clone())]
    ours = [in_halves(first) if is_split else nn.Parameter(first.clone()), nn.Parameter(second.clone())]
    take_steps(torch.optim.AdamW(plain, lr=1e-3, weight_decay=0.1, fused=True), plain, range(10))
    optimizer = AdamW(ours, moments=EightBitMoments(), lr=1e-3, weight_decay=0.1, fused=True)
    take_steps(optimizer, ours, range(10))
    moved, expected = whole(ours[0]) - first, plain[0].detach() - first
    assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.98
    assert (moved - expected).norm() < 0.2 * expected.norm()
    assert not torch.equal(moved, expected)
    assert torch.equal(ours[1], plain[1]), "fewer than 4,096 numbers keep float32 moments"
    state = optimizer.state[ours[0]]
    assert {name: state[name].dtype for name in ("exp_avg", "exp_avg_sq")} == dict.fromkeys(
        ("exp_avg", "exp_avg_sq"), torch.uint8
    )
    assert len(state["exp_avg_scale"]) == -(-6300 // BLOCK)


@needs_bitsandbytes
def test_the_first_step_starts_from_moments_of_zero():
    """After one step both moments are proportional to the gradient and its square: the step is the rate, signed."""
    first, _ = large_and_small()
    weight = nn.Parameter(first.clone())
    take_steps(AdamW([weight], moments=EightBitMoments(), lr=1e-3, weight_decay=0.0), [weight], range(1))
    gradient = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(weight.detach(), first - 1e-3 * gradient.sign(), rtol=0, atol=1e-5)


@needs_bitsandbytes
def test_a_resumed_optimizer_with_8_bit_moments_takes_the_same_steps():
    first, second = large_and_small()
    weights = [in_halves(first), nn.Parameter(first.clone()), nn.Parameter(second.clone())]
    optimizer = AdamW(weights, moments=EightBitMoments(), lr=RATE, precise=[weights[1]])
    take_steps(optimizer, weights, range(3))
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, "optimizer").items()}
    assert tensors["optimizer/0/exp_avg"].dtype == torch.uint8
    assert tensors["optimizer/1/exp_avg"].dtype == torch.float32, "of a weight that is named"
    again = [in_halves(whole(weights[0])), *(nn.Parameter(weight.detach().clone()) for weight in weights[1:])]
    take_steps(optimizer, weights, range(3, 6))
    resumed = AdamW(again, moments=EightBitMoments(), lr=RATE, precise=[again[1]])
    restore_optimizer(resumed, tensors, "optimizer")
    take_steps(resumed, again, range(3, 6))
    for expected, weight in zip(weights, again, strict=True):
        assert torch.equal(whole(weight), whole(expected))
