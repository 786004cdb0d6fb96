"""The kernels as one differentiable function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_cli.attention.contract import AttentionOutput
from rlhf_cli.attention.kernels import launch, schedule
from rlhf_cli.attention.kernels.arguments import addressable, empty_results, on_device_of, refuse_mixed_dtypes
from rlhf_cli.attention.kernels.launch import Call
from rlhf_cli.attention.layout import Layout


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> AttentionOutput:
    """Attention by the kernels. Arguments as in `contract`, but of one dtype.

    Raises:
        UsageError: query, key and value differ in dtype.
    """
    refuse_mixed_dtypes(query, key, value)
    query, key, value = (addressable(tensor) for tensor in (query, key, value))
    sinks = None if sinks is None else sinks.contiguous()
    if bias is not None:
        bias = bias.float() if bias.dtype == torch.float64 else bias
        bias = bias.expand(layout.batch, query.shape[1], layout.query_length, layout.key_length)
    settings = (layout, scale, causal, window, softcap)
    return AttentionOutput(*_Attention.apply(query, key, value, sinks, bias, settings))


class _Attention(torch.autograd.Function):
    """Forward and backward over `Call`'s tensors. The gradient of an expanded bias is summed by autograd's expand."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Any, bias: Any, settings: Any) -> Any:
        call = Call(query, key, value, sinks, bias, *settings)
        output, logsumexp = empty_results(query, value, call.layout)
        with on_device_of(query):
            launch.forward(call, output, logsumexp).run()
        ctx.save_for_backward(query, key, value, sinks, bias, output, logsumexp)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return output, logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, sinks, bias, output, logsumexp = ctx.saved_tensors
        d_output, d_logsumexp = gradients
        if d_output is None and d_logsumexp is None:
            return None, None, None, None, None, None
        call = Call(query, key, value, sinks, bias, *ctx.settings)
        d_output = torch.zeros_like(output) if d_output is None else addressable(d_output)
        origin, delta = torch.empty_like(logsumexp), torch.zeros_like(logsumexp)
        needs_query, needs_key, needs_value, needs_sinks, needs_bias, _ = ctx.needs_input_grad
        d_query = d_key = d_value = d_sinks = d_bias = None
        with on_device_of(query):
            launch.row_sums(call, output, d_output, logsumexp, d_logsumexp, origin, delta).run()
            if needs_query or needs_bias:
                d_query = _like(query, schedule.covers_queries(call.layout))
                # Whole blocks that nobody sees are never visited.
                d_bias = torch.zeros(bias.shape, device=bias.device) if needs_bias else None
                launch.dq(call, d_output, origin, delta, d_query, d_bias).run()
            if needs_key or needs_value:
                covered = schedule.covers_keys(call.layout)
                d_key, d_value = _like(key, covered), _like(value, covered)
                launch.dkdv(call, d_output, origin, delta, d_key, d_value).run()
        if needs_sinks:
            d_sinks = _sink_gradient(sinks, logsumexp, delta)
        if d_bias is not None:
            d_bias = d_bias.to(bias.dtype)
        return d_query, d_key, d_value, d_sinks, d_bias, None


def _sink_gradient(sinks: Tensor, logsumexp: Tensor, delta: Tensor) -> Tensor:
    """Sum over rows of p (0 - delta), p = exp(sink - L) being a sink's weight, which has no value: (H,)."""
    weight = (sinks.float().view(1, -1, 1) - logsumexp).exp()
    share = torch.where(torch.isneginf(logsumexp), 0.0, weight * delta)
    return -share.sum(dim=(0, 2)).to(sinks.dtype)


def _like(tensor: Tensor, is_covered: bool) -> Tensor:
    return torch.empty_like(tensor) if is_covered else torch.zeros_like(tensor)
