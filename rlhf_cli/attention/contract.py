"""The one function every attention backend is.

    scores  = softcap(scale * Q K^T) + bias,        softcap(s) = c tanh(s / c)
    weights = exp(scores - L),                      L = log(sum over visible keys of exp(scores) + exp(sink))
    output  = weights V

Vaswani et al. 2017 (arXiv:1706.03762), equation 1, with what came since: masks by layout, fewer key than query heads
(Ainslie et al. 2023, arXiv:2305.13245), a sliding window (Beltagy et al. 2020, arXiv:2004.05150), a bounded score
(Gemma 2, arXiv:2408.00118) and sinks, a learned score of each head for looking at nothing (gpt-oss, arXiv:2508.10925).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf_cli.attention.layout import Layout


class AttentionOutput(NamedTuple):
    """What attention gives back.

    Attributes:
        output: (B, H, Lq, Dv) in the dtype of the query; 0 on rows that see nothing.
        logsumexp: (B, H, Lq) float32 (float64 for float64 inputs) nats, L above; -inf on rows that see nothing and
            have no sink. Differentiable. None where the backend keeps it to itself, which `Backend.unsupported` says
            of a call that needs it.
    """

    output: Tensor
    logsumexp: Tensor | None


class AttentionFunction(Protocol):
    """A backend's function. All arguments are always given."""

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
        """Attention as the module's equations say, differentiable in every tensor.

        Args:
            query: (B, H, Lq, D), any strides.
            key: (B, G, Lk, D); G divides H, and query head h reads key head h // (H / G).
            value: (B, G, Lk, Dv).
            layout: which rows form which sequence, and who sees whom (`Layout.visible` is the definition).
            scale: usually 1 / sqrt(D).
            causal: a query sees no key behind its own position.
            window: a query sees keys at a distance below this; None for all.
            softcap: c, the bound of a score; None for none.
            sinks: (H,) score of looking at nothing; None for none.
            bias: added to the scores, broadcastable to (B, H, Lq, Lk), by row and not by position; -inf hides.

        Returns:
            Output and log-sum-exp, or the output alone.
        """
        ...


@dataclass(frozen=True)
class Request:
    """One call, without its numbers: what a backend looks at to say whether it can serve it.

    Attributes:
        layout: of the batch.
        causal, window, softcap: as in the call.
        has_sinks, has_bias: whether the call has them.
        heads, key_heads: H and G.
        head_size, value_size: D and Dv.
        dtype, device: of the query.
        needs_grad: whether a backward pass may follow.
        needs_logsumexp: whether the log-sum-exp is wanted too.
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
        """From the arguments of a call."""
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
    """A way to compute attention.

    Attributes:
        name: as `model.attention` names it.
        summary: one line about it.
        attend: the function.
        missing: why it cannot run on this machine at all; None if it can.
        unsupported: why it cannot serve a call; None if it can.
    """

    name: str
    summary: str
    attend: AttentionFunction
    missing: Callable[[], str | None]
    unsupported: Callable[[Request], str | None]
