"""Where a token stands: sinusoids or a learned table added to its embedding, or a rotation of its queries and keys.

Positions are computed from `position_ids` in every forward pass: a table in a buffer would have a longest length, and
would be lost when weights are loaded.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_cli.transformer.config import TransformerConfig


def frequencies(size: int, base: float, device: torch.device | str | None = None) -> Tensor:
    """base^(-2i / size) for i < size / 2, in radians a position: (size / 2,) float32."""
    return 1.0 / base ** (torch.arange(0, size, 2, device=device).float() / size)


def sinusoids(position_ids: Tensor, size: int) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(pos / 10000^(2i/d)).

    Vaswani et al. 2017, section 3.5.

    Args:
        position_ids: any shape.
        size: d, even.

    Returns:
        The shape of `position_ids` and d, float32.
    """
    angles = position_ids.unsqueeze(-1).float() * frequencies(size, 10_000.0, position_ids.device)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class SinusoidalPositions(nn.Module):
    """Adds sinusoids to embeddings."""

    def forward(self, embedded: Tensor, position_ids: Tensor) -> Tensor:
        """(B, T, d) and (B, T) or (1, T) -> (B, T, d)."""
        return embedded + sinusoids(position_ids, embedded.shape[-1]).to(embedded.dtype)


class LearnedPositions(nn.Module):
    """Adds a trained vector a position to embeddings (GPT-2; row PE(pos, :) of a free table instead of sinusoids).

    Args:
        config: its `max_position_embeddings` is the longest sequence.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, embedded: Tensor, position_ids: Tensor) -> Tensor:
        """(B, T, d) and (B, T) or (1, T) -> (B, T, d)."""
        return embedded + self.table(position_ids)


class NoPositions(nn.Module):
    """Leaves embeddings alone: rotary positions act inside attention."""

    def forward(self, embedded: Tensor, position_ids: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        return embedded


def make_positions(config: TransformerConfig) -> nn.Module:
    """What stands between the embedding and the first block."""
    if config.positions == "sinusoidal":
        return SinusoidalPositions()
    return LearnedPositions(config) if config.positions == "learned" else NoPositions()


class Rotation(NamedTuple):
    """Cosines and sines of m theta_i: (B, 1, T, D) float32 each, each angle twice (i and i + D/2)."""

    cos: Tensor
    sin: Tensor


def rotation(config: TransformerConfig, position_ids: Tensor) -> Rotation | None:
    """Angles m theta_i, theta_i = base^(-2i/D) (Su et al. 2021, section 3.2.2); None where positions are not rotary.

    Args:
        config: base, head size D and stretching.
        position_ids: m, (B, T) or (1, T).
    """
    if config.positions != "rotary":
        return None
    assert config.head_dim is not None
    theta = frequencies(config.head_dim, config.rope_base, position_ids.device)
    if config.llama3_rope is not None:
        theta = stretched(theta, config.llama3_rope)
    angles = position_ids[:, None, :, None].float() * theta
    angles = torch.cat([angles, angles], dim=-1)
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, angles: Rotation) -> Tensor:
    """Turn the plane of components i and i + D/2 by m theta_i (Su et al. 2021, equation 15; the pairing is Llama's).

    The inner product of a query turned by m and a key turned by n depends on m - n alone.

    Args:
        x: (B, H, T, D) queries or keys.
        angles: of their positions.
    """
    first, second = x.chunk(2, dim=-1)
    # In float32 and back, so that queries, keys and values keep one type under autocast.
    return (x * angles.cos + torch.cat([-second, first], dim=-1) * angles.sin).to(x.dtype)


def stretched(theta: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1's frequencies for contexts longer than those it was trained on first (arXiv:2407.21783, section 3.4).

    Waves shorter than L / high_freq_factor stay, those longer than L / low_freq_factor become `factor` times longer,
    and between the two one passes smoothly into the other; L is the context of the first training.

    Args:
        theta: (D/2,) radians a position.
        scaling: see `TransformerConfig.llama3_rope`.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves_in_context = scaling["original_max_position_embeddings"] * theta / (2 * math.pi)
    kept = ((waves_in_context - low) / (high - low)).clamp(0.0, 1.0)
    return kept * theta + (1 - kept) * theta / scaling["factor"]
