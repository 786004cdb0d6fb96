"""Mixed precision: torch's autocast for the whole package."""

from __future__ import annotations

import torch


def autocast(device: torch.device | str, precision: torch.dtype) -> torch.autocast:
    """Context that computes matrix products in `precision`; no effect for float32.

    Args:
        device: where the products are computed.
        precision: float32 or bfloat16.
    """
    kind = device if isinstance(device, str) else device.type
    return torch.autocast(kind, dtype=precision, enabled=precision != torch.float32)
