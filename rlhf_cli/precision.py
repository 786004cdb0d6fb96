"""Mixed precision: torch's autocast for the whole package, and the precision it gives matrix products."""

from __future__ import annotations

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
