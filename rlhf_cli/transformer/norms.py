"""Normalization of the hidden state of each token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlhf_cli.transformer.config import TransformerConfig


class LayerNorm(nn.LayerNorm):
    """w * (x - mean(x)) / sqrt(var(x) + eps) + b over the last dimension (Ba et al. 2016, arXiv:1607.06450).

    It uses torch's fused kernel; written out, the backward pass would keep four copies of x.
    """


class RMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + eps) over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4).

    Args:
        size: d.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d), the division in float32."""
        wide = x.float()
        normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normalized.to(x.dtype)


def make_norm(config: TransformerConfig) -> nn.Module:
    """Make the norm of a configuration."""
    kind = LayerNorm if config.norm == "layer" else RMSNorm
    return kind(config.hidden_size, eps=config.norm_eps)
