"""Token positions: sinusoids or a learned table added to the embedding, or a rotation of queries and keys.

Sinusoids and rotations are computed from `position_ids` in every forward pass: a table in a buffer would limit the
length, and would be lost when weights are loaded.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_cli.transformer.config import TransformerConfig


def frequencies(size: int, base: float, device: torch.device | str | None = None) -> Tensor:
    """Return base^(-2i / size) for i < size / 2, in radians per position: (size / 2,) float32."""
    return 1.0 / base ** (torch.arange(0, size, 2, device=device).float() / size)


def sinusoids(position_ids: Tensor, size: int) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(pos / 10000^(2i/d)).

    Vaswani et al. 2017, section 3.5.

    Args:
        position_ids: any shape.
        size: d, even.

    Returns:
        The shape of `position_ids` with a last dimension d, float32.
    """
    angles = position_ids.unsqueeze(-1).float() * frequencies(size, 10_000.0, position_ids.device)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class SinusoidalPositions(nn.Module):
    """Adds sinusoids to embeddings."""

    def forward(self, embedded: Tensor, position_ids: Tensor) -> Tensor:
        """(B, T, d) and (B, T) or (1, T) -> (B, T, d)."""
        return embedded + sinusoids(position_ids, embedded.shape[-1]).to(embedded.dtype)


class LearnedPositions(nn.Module):
    """Adds one trained vector per position to embeddings (GPT-2): PE(pos, :) is row pos of a table.

    Args:
        config: `max_position_embeddings` is the length of the table.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, embedded: Tensor, position_ids: Tensor) -> Tensor:
        """(B, T, d) and (B, T) or (1, T) -> (B, T, d)."""
        return embedded + self.table(position_ids)


class NoPositions(nn.Module):
    """Does not change embeddings: rotary positions act inside attention."""

    def forward(self, embedded: Tensor, position_ids: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        return embedded


def make_positions(config: TransformerConfig) -> nn.Module:
    """Make the module between the embedding and the first block."""
    if config.positions == "sinusoidal":
        return SinusoidalPositions()
    return LearnedPositions(config) if config.positions == "learned" else NoPositions()


class Rotation(NamedTuple):
    """Cosines and sines of m theta_i: (B, 1, T, D) float32 each; each angle occurs twice, at i and i + D/2."""

    cos: Tensor
    sin: Tensor


def rotation(config: TransformerConfig, position_ids: Tensor) -> Rotation | None:
    """Compute the angles m theta_i, theta_i = base^(-2i/D) (Su et al. 2021, section 3.2.2); None if not rotary.

    Args:
        config: base, head size D and frequency scaling.
        position_ids: m, (B, T) or (1, T).
    """
    if config.positions != "rotary":
        return None
    assert config.head_dim is not None
    theta = frequencies(config.head_dim, config.rope_base, position_ids.device)
    if config.llama3_rope is not None:
        theta = scaled_frequencies(theta, config.llama3_rope)
    angles = position_ids[:, None, :, None].float() * theta
    angles = torch.cat([angles, angles], dim=-1)
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, angles: Rotation) -> Tensor:
    """Rotate the plane of components i and i + D/2 by m theta_i (Su et al. 2021, equation 15; Llama's pairing).

    The inner product of a query at position m and a key at position n then depends on m - n only.

    Args:
        x: (B, H, T, D) queries or keys.
        angles: from `rotation`.
    """
    first, second = x.chunk(2, dim=-1)
    # Compute in float32 and cast back, so that queries, keys and values keep one dtype under autocast.
    return (x * angles.cos + torch.cat([-second, first], dim=-1) * angles.sin).to(x.dtype)


def scaled_frequencies(theta: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Scale frequencies for contexts longer than in pre-training, as Llama 3.1 (arXiv:2407.21783, section 3.4).

    Wavelengths below L / high_freq_factor stay, those above L / low_freq_factor become `factor` times longer, and those
    between are interpolated; L is the context length of pre-training.

    Args:
        theta: (D/2,) radians per position.
        scaling: see `TransformerConfig.llama3_rope`.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves_in_context = scaling["original_max_position_embeddings"] * theta / (2 * math.pi)
    kept = ((waves_in_context - low) / (high - low)).clamp(0.0, 1.0)
    return kept * theta + (1 - kept) * theta / scaling["factor"]
