"""Mixed precision: torch's autocast, the precision it gives matrix products, and products that are not rounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def autocast(device: torch.device | str, precision: torch.dtype) -> torch.autocast:
    """Context that computes matrix products in `precision`; no effect for float32.

    Args:
        device: where the products are computed.
        precision: float32 or bfloat16.
    """
    kind = device if isinstance(device, str) else device.type
    return torch.autocast(kind, dtype=precision, enabled=precision != torch.float32)


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Return the precision of matrix products with `hidden`: that of autocast, without it that of `hidden`."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


@contextmanager
def exact_products() -> Iterator[None]:
    """Context in which products of float32 are those of float32.

    Elsewhere `torch.set_float32_matmul_precision` or an environment variable may round their inputs to TF32, or on a
    CPU to bfloat16. A comparison of two ways to compute the same would mistake that rounding for a fault.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
