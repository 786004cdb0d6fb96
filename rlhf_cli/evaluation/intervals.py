"""Intervals by bootstrap over prompts: answers to one prompt are alike, so prompts are what is drawn again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_DRAWS_AT_ONCE = 2_000_000


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of sum(numerators) / sum(denominators) over resampled prompts (Efron 1979).

    Args:
        numerators: one a prompt, such as its pairs ordered rightly, or its share of wins.
        denominators: one a prompt, such as its pairs; all 1 gives the mean over prompts.
        resamples: sets of prompts drawn with replacement.
        seed: of the draws.
        level: share of resamples inside the interval.

    Returns:
        Low and high end.
    """
    above = torch.tensor(numerators, dtype=torch.float64)
    below = torch.tensor(denominators, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    ratios = []
    rows_at_once = max(1, _DRAWS_AT_ONCE // len(above))
    for start in range(0, resamples, rows_at_once):
        shape = (min(rows_at_once, resamples - start), len(above))
        drawn = torch.randint(len(above), shape, generator=generator)
        ratios.append(above[drawn].sum(dim=1) / below[drawn].sum(dim=1))
    # A resample may hold no pair at all, where a few prompts have ties only.
    all_ratios = torch.cat(ratios).nan_to_num(nan=0.5)
    tail = (1.0 - level) / 2
    low, high = torch.quantile(all_ratios, torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return low, high


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; 0 for a single one."""
    if len(values) < 2:
        return 0.0
    return float(torch.tensor(values, dtype=torch.float64).std() / len(values) ** 0.5)
