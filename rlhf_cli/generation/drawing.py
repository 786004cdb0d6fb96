"""Draw tokens from logits, by inverting the cumulative distribution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 128
"""Tokens whose masses are summed before the cumulative sum."""


def draw(logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float = 1.0) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution: the first whose cumulative mass exceeds u.

    The cumulative sum goes over blocks of tokens first, and then over the tokens of the block that was found: one of
    the whole vocabulary in float64 takes ten times as long. Masses of blocks are float32 sums, whose rounding is that
    of the probabilities themselves.

    Nothing here waits for the device: a row whose logits are not finite has no such token, and gets V.

    Args:
        logits: (B, V) float32.
        uniforms: (B,) in [0, 1), float64.
        temperature: logits are divided by it.
        top_p: keep the smallest set of tokens with at least this probability (Holtzman et al. 2019, section 3.1).

    Returns:
        (B,) token ids; V in rows whose logits are not finite.
    """
    probabilities = torch.softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
    if top_p < 1.0:
        descending, indices = probabilities.sort(dim=-1, descending=True)
        # A token is outside once the mass before it already reaches top_p; the first is always inside.
        is_outside = descending.cumsum(dim=-1) - descending >= top_p
        probabilities = probabilities.scatter(-1, indices, descending.masked_fill(is_outside, 0.0))
    rows, count = probabilities.shape
    if padding := -count % _BLOCK:
        probabilities = F.pad(probabilities, (0, padding))
    blocks = probabilities.view(rows, -1, _BLOCK)
    masses = blocks.sum(-1)
    block, rest = _inverted(masses, uniforms)
    picked = torch.arange(rows, device=logits.device), block
    # `rest` is a share of the block's mass as it was summed above; the sum of its tokens may be rounded otherwise.
    token, _ = _inverted(blocks[picked], rest / masses[picked].double())
    return torch.where(masses.sum(-1).isfinite(), block * _BLOCK + token, count)


def _inverted(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first index whose cumulative mass exceeds u times the total, and how far into its mass that is.

    Args:
        masses: (B, N), not negative.
        uniforms: (B,) in [0, 1], float64.

    Returns:
        Indices (B,), of entries whose mass is not 0, and (B,) float64.
    """
    cumulative = masses.double().cumsum(-1)
    total = cumulative[:, -1]
    # Rounding must not reach the total, which no cumulative mass exceeds.
    threshold = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, threshold.unsqueeze(-1), right=True).squeeze(-1)
    index = index.clamp_(max=masses.shape[-1] - 1)  # only where masses are not finite
    before = cumulative.gather(-1, index.unsqueeze(-1)).squeeze(-1) - masses.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return index, (threshold - before).clamp_(min=0.0)
