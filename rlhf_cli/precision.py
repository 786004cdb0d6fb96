"""Mixed precision: the one place that enters torch's autocast."""

from __future__ import annotations

import torch


def autocast(device: torch.device | str, precision: torch.dtype) -> torch.autocast:
    """Context in which matrix products are computed in `precision`; float32 changes nothing.

    Args:
        device: where the products are computed.
        precision: float32 or bfloat16.
    """
    kind = device if isinstance(device, str) else device.type
    return torch.autocast(kind, dtype=precision, enabled=precision != torch.float32)
