"""From a call's tensors and numbers to what kernels take: what `function`, `launch` and `decode` share (torch only)."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from rlhf_cli.attention.kernels import schedule
from rlhf_cli.attention.layout import Layout
from rlhf_cli.errors import UsageError

_LARGEST_OFFSET = 2**31 - 1


def addressable(tensor: Tensor) -> Tensor:
    """The tensor, copied where the kernels could not read it in place.

    They take any strides but in the last dimension, and count inside a batch row and head in 32 bits.
    """
    if tensor.stride(-1) == 1 and tensor.shape[2] * tensor.stride(2) <= _LARGEST_OFFSET:
        return tensor
    return tensor.contiguous()


def refuse_mixed_dtypes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """The kernels multiply in the dtype of the tensors, which must be one: a cast here would hide a slow float32 call.

    Raises:
        UsageError: query, key and value differ in dtype.
    """
    if not query.dtype == key.dtype == value.dtype:
        dtypes = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in (query, key, value))
        raise UsageError(
            f"attention backend `triton`: query, key and value are of different dtypes: {dtypes}",
            hint="cast them to one dtype, as `registry.attention` does",
        )


def empty_results(query: Tensor, value: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Output (B, H, Lq, Dv) and log-sum-exp (B, H, Lq) for a kernel to fill; rows it leaves alone are 0 and -inf."""
    # Heads inside rows, as a model wants them next: (B, Lq, H, Dv).
    shape = (layout.batch, layout.query_length, query.shape[1], value.shape[-1])
    output = query.new_empty(shape) if schedule.covers_queries(layout) else query.new_zeros(shape)
    logsumexp = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    return addressable(output.transpose(1, 2)), logsumexp


def score_rules(
    scale: float, softcap: float | None, *, causal: bool, window: int | None
) -> dict[str, float | int | bool]:
    """How scores are scaled, bounded and hidden, in units of log2 (see `device`)."""
    log2_e = math.log2(math.e)
    return {
        "score_scale": scale * log2_e if softcap is None else scale / softcap,
        "cap": 0.0 if softcap is None else softcap * log2_e,
        "window": min(window or 0, schedule.NO_LIMIT),
        "CAUSAL": causal,
        "WINDOW": window is not None,
        "SOFTCAP": softcap is not None,
    }


def strides(name: str, tensor: Tensor | None) -> dict[str, int]:
    """The first three strides under the names of the kernels' arguments."""
    first = (0, 0, 0) if tensor is None else tensor.stride()[:3]
    last = "q" if name.endswith("bias") else "l"
    return dict(zip((f"{name}_b", f"{name}_h", f"{name}_{last}"), first, strict=True))


def padded(size: int) -> int:
    """The next power of two that a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length())


@cache  # asked at every call
def capability_of(device: torch.device) -> int:
    """Compute capability of a GPU, as 89 for 8.9, and 0 for what is none."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton starts kernels on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
