"""The function that every attention backend implements.

    scores  = softcap(scale * Q K^T) + bias,        softcap(s) = c tanh(s / c)
    weights = exp(scores - L),                      L = log(sum over visible keys of exp(scores) + exp(sink))
    output  = weights V

Vaswani et al. 2017 (arXiv:1706.03762), equation 1, extended by: visibility by layout, grouped-query attention (Ainslie
et al. 2023, arXiv:2305.13245), a sliding window (Beltagy et al. 2020, arXiv:2004.05150), a soft cap on scores (Gemma 2,
arXiv:2408.00118) and attention sinks, a learned score per head that adds to the denominator only (gpt-oss,
arXiv:2508.10925).

Shapes: B batch rows, H query heads, G key/value heads, Lq query length, Lk key length, D head size of queries and keys,
Dv head size of values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf_cli.attention.layout import Layout


class AttentionOutput(NamedTuple):
    """Result of attention.

    Attributes:
        output: (B, H, Lq, Dv) in the dtype of the query; 0 in rows without visible keys.
        logsumexp: (B, H, Lq) L above, in nats, float32 (float64 for float64 inputs), differentiable; -inf in rows
            without visible keys and without a sink. None if the backend does not return it; `Backend.unsupported`
            then rejects calls that need it.
    """

    output: Tensor
    logsumexp: Tensor | None


class AttentionFunction(Protocol):
    """The function of a backend. Every call passes all arguments."""

    def __call__(
        self,
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
    ) -> AttentionOutput | Tensor:
        """Compute the equations of this module, differentiable in every tensor.

        Args:
            query: (B, H, Lq, D), any strides.
            key: (B, G, Lk, D); G divides H, and query head h uses key head h // (H / G).
            value: (B, G, Lk, Dv).
            layout: the sequences of the batch; `Layout.visible` defines which keys a query sees.
            scale: usually 1 / sqrt(D).
            causal: hide keys after the position of the query.
            window: hide keys at this distance or more, in tokens; None: no window.
            softcap: c above; None: no cap.
            sinks: (H,) sink score per head; None: no sinks.
            bias: added to the scores, broadcastable to (B, H, Lq, Lk), indexed by row of the batch (not by position in
                the sequence); -inf hides a key. None: no bias.

        Returns:
            Output and log-sum-exp, or the output only.
        """
        ...


@dataclass(frozen=True)
class Request:
    """Description of one call without its tensors, from which a backend decides whether it supports the call.

    Attributes:
        layout: the sequences of the batch.
        causal, window, softcap: as in the call.
        has_sinks, has_bias: whether the call has sinks and a bias.
        heads, key_heads: H and G.
        head_size, value_size: D and Dv.
        dtype, device: of the query.
        needs_grad: a backward pass may follow.
        needs_logsumexp: the log-sum-exp is required too.
    """

    layout: Layout
    causal: bool
    window: int | None
    softcap: float | None
    has_sinks: bool
    has_bias: bool
    heads: int
    key_heads: int
    head_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device
    needs_grad: bool
    needs_logsumexp: bool

    @staticmethod
    def of(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        *,
        causal: bool,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        bias: Tensor | None,
        needs_logsumexp: bool = False,
    ) -> Request:
        """Build the request of a call from its arguments."""
        tensors = [tensor for tensor in (query, key, value, sinks, bias) if tensor is not None]
        return Request(
            layout=layout,
            causal=causal,
            window=window,
            softcap=softcap,
            has_sinks=sinks is not None,
            has_bias=bias is not None,
            heads=query.shape[1],
            key_heads=key.shape[1],
            head_size=query.shape[-1],
            value_size=value.shape[-1],
            dtype=query.dtype,
            device=query.device,
            needs_grad=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
            needs_logsumexp=needs_logsumexp,
        )


@dataclass(frozen=True)
class Backend:
    """An implementation of attention.

    Attributes:
        name: its value in `model.attention`.
        summary: description in one line.
        attend: the function.
        missing: returns why the backend cannot run on this machine; None if it can.
        unsupported: returns why the backend does not support a call; None if it does.
    """

    name: str
    summary: str
    attend: AttentionFunction
    missing: Callable[[], str | None]
    unsupported: Callable[[Request], str | None]
