"""AdamW on weights in two halves takes the steps of AdamW on float32 weights."""

from __future__ import annotations

import torch
from torch import nn

from rlhf_cli.models.split_weights import LOW, join, low_bits, split
from rlhf_cli.training import adamw
from rlhf_cli.training.adamw import AdamW
from rlhf_cli.training.checkpoint.store import optimizer_tensors, restore_optimizer

RATE = 1e-5
"""A step of this size is far below what bfloat16 resolves in a weight of 1."""


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
