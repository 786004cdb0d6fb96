"""Our Triton kernels, as a backend: importable where triton is absent, and then saying so."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.attention.contract import AttentionOutput, Backend, Request
from rlhf_cli.attention.layout import Layout

LARGEST_HEAD = 256


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
    """FlashAttention by our Triton kernels, those for few queries where there are few. Arguments as in `contract`."""
    from rlhf_cli.attention.kernels import decode, function  # need triton

    rules: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap, "sinks": sinks}
    if decode.serves(Request.of(query, key, value, layout, bias=bias, **rules)):
        return decode.decode(query, key, value, layout, scale=scale, **rules)
    return function.attend(
        query,
        key,
        value,
        layout,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
        bias=bias,
    )


def missing() -> str | None:
    """Why the kernels cannot run on this machine."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not _is_interpreted():
        return "it needs a CUDA device, or TRITON_INTERPRET=1"
    return None


def unsupported(request: Request) -> str | None:
    """Why the kernels cannot serve a call."""
    if request.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes in float32 at most, and the query is {_short(request.dtype)}"
    if (size := max(request.head_size, request.value_size)) > LARGEST_HEAD:
        return f"its heads are at most {LARGEST_HEAD} wide, and these are {size}"
    if request.device.type != "cuda" and not _is_interpreted():
        return f"it runs on CUDA devices, and the query is on {request.device.type}"
    if _is_interpreted() and request.dtype == torch.bfloat16:
        return "Triton's interpreter rounds bfloat16 wrongly"
    return None


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


BACKEND = Backend(
    "triton", "FlashAttention in Triton, over every layout, prefix trees in place", attend, missing, unsupported
)
