"""Best of n: the completion that a reward prefers among n samples of one prompt, estimated from N >= n samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def sizes_up_to(count: int) -> list[int]:
    """Return 1, 2, 4, ... and `count` itself."""
    return sorted({2**power for power in range(count.bit_length()) if 2**power < count} | {count})


def kl_bound(n: int) -> float:
    """Upper bound of KL(best of n || policy) in nats: log n - (n - 1) / n.

    It is close to the KL if equal completions and equal rewards are rare; otherwise the KL is smaller (Beirami et al.
    2024, arXiv:2401.01879).

    Args:
        n: number of samples, at least 1.
    """
    return math.log(n) - (n - 1) / n


def expected_best(
    rewards: Sequence[float] | NDArray[np.float64],
    values: Sequence[float] | NDArray[np.float64],
    sizes: Sequence[int],
) -> NDArray[np.float64]:
    """Estimate, without bias, the expected value of the sample with the highest reward among n samples of one prompt.

    The mean over all sets of n of the N samples (Nakano et al. 2021, arXiv:2112.09332; Gao et al. 2022,
    arXiv:2210.10760): sum_i C(i - 1, n - 1) / C(N, n) value_(i), where value_(i) belongs to the i-th smallest reward.
    Samples with equal rewards share their weights, which is the mean over all of their orders: a set whose best samples
    are tied counts the mean of their values.

    Args:
        rewards: (N,) finite; they decide which sample is the best.
        values: (N,) of the same samples, for example their gold scores, or the rewards themselves.
        sizes: n, each from 1 to N.

    Returns:
        (len(sizes),) float64.

    Raises:
        ValueError: a size is not between 1 and N.
    """
    reward, value = np.asarray(rewards, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if any(not 1 <= n <= len(reward) for n in sizes):
        raise ValueError(f"expected sizes between 1 and {len(reward)}, the number of samples; got {list(sizes)}")
    _, level, times = np.unique(reward, return_inverse=True, return_counts=True)
    mean_of_level = np.bincount(level, weights=value) / times
    ends = np.cumsum(times)
    found = []
    for n in sizes:
        weight = np.add.reduceat(_weights(len(reward), n), ends - times)
        found.append(float(weight @ mean_of_level))
    return np.array(found)


def _weights(count: int, n: int) -> NDArray[np.float64]:
    """Return C(i - 1, n - 1) / C(N, n) for i = 1 .. N: (N,), which add up to 1.

    From the largest, n / N, downward by the ratio of neighbors, (i - n) / (i - 1): every factor is at most 1, so no
    binomial coefficient overflows.
    """
    ranks = np.arange(count, 1, -1, dtype=np.float64)
    factors = np.concatenate([[n / count], np.maximum(ranks - n, 0.0) / (ranks - 1)])
    return np.multiply.accumulate(factors)[::-1]
