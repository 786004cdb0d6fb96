"""Sums, means and whitening over real tokens. What stands on padding is never read, not even multiplied by zero."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(values: Tensor, is_real: Tensor) -> Tensor:
    """Sum of `values` where `is_real`: scalar. `masked_fill`, since NaN x 0 is NaN."""
    return values.masked_fill(~is_real, 0.0).sum()


def masked_mean(values: Tensor, is_real: Tensor) -> Tensor:
    """Mean of `values` where `is_real`: scalar; NaN where nothing is real."""
    return masked_sum(values, is_real) / is_real.sum()


def masked_variance(values: Tensor, is_real: Tensor) -> Tensor:
    """Population variance of `values` where `is_real`: scalar."""
    return masked_mean((values - masked_mean(values, is_real)) ** 2, is_real)


def whiten(values: Tensor, is_real: Tensor, *, keep_mean: bool = False, epsilon: float = 1e-8) -> Tensor:
    """Scale to standard deviation 1 over real entries and, unless `keep_mean`, shift to mean 0.

    Args:
        values: any shape.
        is_real: same shape, bool.
        keep_mean: rewards keep theirs (it says good or bad), advantages lose it.
        epsilon: added to the variance.

    Returns:
        Same shape; 0 where not real.
    """
    mean = masked_mean(values, is_real)
    whitened = (values - mean) * torch.rsqrt(masked_variance(values, is_real) + epsilon)
    if keep_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~is_real, 0.0)
