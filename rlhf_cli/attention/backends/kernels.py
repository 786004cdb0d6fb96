"""The `triton` backend: our Triton kernels. Importable without triton; `missing` then says so."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.attention.contract import AttentionOutput, Backend, Request
from rlhf_cli.attention.kernels.tiles import shared_memory
from rlhf_cli.attention.layout import Layout

MAX_HEAD_SIZE = 256
# Older GPUs have no bfloat16 and no asynchronous copies.
MIN_COMPUTE_CAPABILITY = 8


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
    """Compute attention with our Triton kernels, using the decoding kernel if it supports the call; see `contract`."""
    from rlhf_cli.attention.kernels import decode, function  # these import triton

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
    """Return why the kernels cannot run on this machine; None if they can."""
    if not has_triton():
        return "triton is not installed"
    if not _is_interpreted() and not has_cuda():
        return "it needs a CUDA device, or TRITON_INTERPRET=1"
    return None


def unsupported(request: Request) -> str | None:
    """Return why the kernels do not support a call; None if they do."""
    if request.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes in float32 at most, and the query is {_dtype_name(request.dtype)}"
    if (size := max(request.head_size, request.value_size)) > MAX_HEAD_SIZE:
        return f"its heads are at most {MAX_HEAD_SIZE} wide, and these are {size}"
    if request.device.type != "cuda" and not _is_interpreted():
        return f"it runs on CUDA devices, and the query is on {request.device.type}"
    if not _is_interpreted():
        return _unsupported_by_gpu(request)
    return "Triton's interpreter rounds bfloat16 wrongly" if request.dtype == torch.bfloat16 else None


def _unsupported_by_gpu(request: Request) -> str | None:
    """Return why the GPU does not support a call; None if it does."""
    if torch.version.hip is not None:
        return "it runs on NVIDIA's GPUs, and this torch is built for ROCm"
    major, minor, available = gpu_properties(request.device.index)
    if major < MIN_COMPUTE_CAPABILITY:
        return f"it needs a GPU of compute capability {MIN_COMPUTE_CAPABILITY}.0, and this one's is {major}.{minor}"
    needed = shared_memory(
        max(request.head_size, request.value_size),
        is_32_bit=request.dtype == torch.float32,
        has_bias=request.has_bias,
        needs_grad=request.needs_grad,
        capability=major,
    )
    if needed > available:
        return f"it needs {needed} bytes of shared memory for a tile of this call, and the GPU gives {available}"
    return None


@cache
def gpu_properties(index: int | None) -> tuple[int, int, int]:
    """Compute capability (major, minor), and the shared memory available to a block in bytes."""
    properties = torch.cuda.get_device_properties(index)
    return properties.major, properties.minor, properties.shared_memory_per_block_optin


# Cached because `auto` asks on every call, and finding a module takes longer than launching a kernel.
@cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@cache
def has_cuda() -> bool:
    """Return whether torch finds a CUDA device."""
    return torch.cuda.is_available()


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


BACKEND = Backend(
    "triton", "FlashAttention in Triton for every layout, including prefix trees", attend, missing, unsupported
)
