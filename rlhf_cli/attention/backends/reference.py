"""The `reference` backend: the equation with all scores in memory. All other backends are compared with it."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_cli.attention.contract import AttentionOutput, Backend
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
    """Compute attention in float32, or in float64 for float64 inputs; see `contract`."""
    weights, logsumexp = attention_weights(
        query, key, layout, scale=scale, causal=causal, window=window, softcap=softcap, sinks=sinks, bias=bias
    )
    # Padding may contain NaN, and 0 x NaN is NaN.
    is_padding = ~layout.is_real_key(value.device)[:, None, :, None]
    value = _for_query_heads(value.masked_fill(is_padding, 0.0), query)
    output = weights @ value.to(weights.dtype)
    return AttentionOutput(output.to(query.dtype), logsumexp)


def attention_weights(
    query: Tensor,
    key: Tensor,
    layout: Layout,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute weights (B, H, Lq, Lk), whose rows sum to 1 minus the share of a sink, and log-sum-exp (B, H, Lq)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = scale * query.to(dtype) @ _for_query_heads(key, query).to(dtype).transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = layout.visible(causal=causal, window=window, device=query.device).unsqueeze(1)  # (B, 1, Lq, Lk)
    if bias is not None:
        visible = visible & ~torch.isneginf(bias)
        scores = scores + bias.to(dtype).masked_fill(torch.isneginf(bias), 0.0)
    scores = scores.masked_fill(~visible, -torch.inf)
    logsumexp = scores.logsumexp(-1)
    if sinks is not None:
        logsumexp = torch.logaddexp(logsumexp, sinks.to(dtype).view(1, -1, 1))
        is_real = layout.is_real(query.device).unsqueeze(1)
        logsumexp = logsumexp.masked_fill(~is_real, -torch.inf)
    # In rows without visible keys -inf - -inf would be NaN.
    weights = (scores - logsumexp.masked_fill(torch.isneginf(logsumexp), 0.0).unsqueeze(-1)).exp()
    return weights, logsumexp


def _for_query_heads(tensor: Tensor, query: Tensor) -> Tensor:
    """Repeat each of G key heads for its H / G query heads: (B, H, Lk, D)."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)


BACKEND = Backend(
    "reference",
    "the equation with all scores in memory",
    attend,
    missing=lambda: None,
    unsupported=lambda request: None,
)
