"""How far the probability sigmoid(r_w - r_l) that a reward model gives to a preference can be believed.

Confidence is sigmoid(|d|) of the difference d of two rewards, at least 1/2. A pair is right where the preferred
completion has the higher reward, and half right where both are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.intervals import PromptSums, percentiles, resampled_sums
from rlhf_cli.rewards.estimates import Measured

BINS = 10
_RESAMPLES = 2_000


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error of pairs.

    Attributes:
        error: with its interval.
        if_calibrated: error that a perfectly calibrated model would show on as many independent pairs with the same
            confidences: the error of a finite sample is never 0.
    """

    error: Measured
    if_calibrated: float


def is_right(difference: float) -> float:
    """Return 1 for a pair in the right order, 1/2 for equal rewards, else 0."""
    return 0.5 if difference == 0 else float(difference > 0)


def confidence(difference: float) -> float:
    """sigmoid(|d|)."""
    return 1.0 / (1.0 + math.exp(-abs(difference)))


def confidence_bin(difference: float) -> int:
    """Number of the bin of a difference, among `BINS` of equal width from 1/2 to 1."""
    return min(BINS - 1, int((confidence(difference) - 0.5) * 2 * BINS))


def calibration(prompts: Sequence[str], differences: Sequence[float]) -> Calibration:
    """Expected calibration error: the mean over pairs of |confidence - accuracy| of their bin (Guo et al. 2017, eq. 3).

    The error of a sample is larger than that of the model, because noise in a bin counts as error. By the triangle
    inequality the two differ by at most the sum over bins of |noise|, whose 95 % quantile over resamples of prompts is
    subtracted for the lower end of the interval. The upper end is the 97.5 % quantile of the error of resamples, which
    is larger again. Simulated coverage was 93 % or more from 80 pairs on. With one prompt the interval is 0 to 1.

    Args:
        prompts: (P,) key of the prompt of each pair.
        differences: (P,) reward of the preferred completion minus that of the other, P at least 1.
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    sums = np.zeros((len(numbers), BINS + 1))
    variances = np.zeros(BINS)
    for prompt, difference in zip(prompts, differences, strict=True):
        held, row = confidence(difference), sums[numbers[prompt]]
        row[confidence_bin(difference)] += held - is_right(difference)
        row[BINS] += 1
        variances[confidence_bin(difference)] += held * (1 - held)
    error = float(_error(sums.sum(axis=0)))
    low, high = 0.0, 1.0
    if len(numbers) > 1:
        columns = [PromptSums(np.arange(len(numbers)), sums)]
        (totals,) = resampled_sums(columns, len(numbers), resamples=_RESAMPLES, seed=0)
        whole = sums.sum(axis=0)
        noise = np.abs(totals[:, :BINS] / totals[:, BINS:] - whole[:BINS] / whole[BINS]).sum(axis=1)
        low = max(0.0, error - float(np.quantile(noise, 0.95)))
        high = max(error, percentiles(_error(totals))[1])
    # The mean of |S| of a sum S of independent zero-mean terms is sqrt(2 / pi) of its deviation, near a normal S.
    expected = float(np.sqrt(2 / np.pi * variances).sum()) / len(differences)
    return Calibration(Measured(error, low, high, len(numbers), len(differences)), expected)


def _error(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """|surplus of confidence| over all bins, per pair; the last axis has the bins and the number of pairs."""
    return np.abs(sums[..., :BINS]).sum(axis=-1) / sums[..., BINS]
