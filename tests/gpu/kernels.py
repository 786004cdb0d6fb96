"""The `triton` backend on the fake device: the real planning on the host, and values by torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.gpu.device import ledger


def install() -> None:
    """Replace the kernels of rlhf_cli, which must be importable, by their plans and torch's attention."""
    from rlhf_cli.attention import registry
    from rlhf_cli.attention.contract import Request
    from rlhf_cli.attention.kernels import decode, launch
    from rlhf_cli.attention.kernels.arguments import empty_results

    values = registry.find("torch").attend

    def attend(query: Tensor, key: Tensor, value: Tensor, layout: Any, *, bias: Any, scale: float, **rules: Any) -> Any:
        if decode.serves(Request.of(query, key, value, layout, bias=bias, **rules)):
            decode.launches(query, key, value, layout, scale=scale, **rules)
        else:
            numbers = (rules["causal"], rules["window"], rules["softcap"])
            call = launch.Call(query, key, value, rules["sinks"], bias, layout, scale, *numbers)
            launch.forward(call, *empty_results(query, value, layout))
            if torch.is_grad_enabled() and query.requires_grad:
                launch.dq(call, query, query, query, query, None)
                launch.dkdv(call, query, query, query, key, value)
        sinks = rules.pop("sinks")

        def compute(*tensors: Tensor | None) -> Tensor:
            query, key, value, bias, sinks = tensors
            return values(query, key, value, layout, scale=scale, bias=bias, sinks=sinks, **rules)[0]  # pyright: ignore

        return _Attention.apply(compute, query, key, value, bias, sinks)

    built_in = registry.built_in()
    built_in["triton"] = dataclasses.replace(built_in["triton"], attend=attend)


class _Attention(torch.autograd.Function):
    """Saves the inputs and computes everything again in the backward pass; scores do not count as memory.

    Like a kernel, it neither makes a mask nor waits for the device.
    """

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        """Compute values; `tensors` are query, key, value, bias and sinks."""
        ctx.compute = compute
        ctx.save_for_backward(*tensors)
        with ledger.paused():
            found = compute(*tensors)
        return found.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of all inputs that need one."""
        needed = ctx.needs_input_grad[1:]
        with ledger.paused(), torch.enable_grad():
            tensors = [
                None if one is None else one.detach().requires_grad_(is_needed)
                for one, is_needed in zip(ctx.saved_tensors, needed, strict=True)
            ]
            wanted = [one for one, is_needed in zip(tensors, needed, strict=True) if is_needed and one is not None]
            found = iter(torch.autograd.grad(ctx.compute(*tensors), wanted, gradients[0]))
        return (None, *(next(found).clone() if is_needed else None for is_needed in needed))
