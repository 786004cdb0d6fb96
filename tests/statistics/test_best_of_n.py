"""The best-of-n estimator against closed forms, and against every subset of the samples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rlhf_cli.statistics.best_of_n import expected_best, kl_bound, sizes_up_to


def over_all_subsets(rewards, values, n: int) -> float:
    """Mean over all sets of n samples of the mean value of those with the highest reward."""
    found = []
    for chosen in itertools.combinations(range(len(rewards)), n):
        best = max(rewards[i] for i in chosen)
        tied = [values[i] for i in chosen if rewards[i] == best]
        found.append(sum(tied) / len(tied))
    return sum(found) / len(found)


@pytest.mark.parametrize("levels", [2, 3, 100], ids=["many ties", "some ties", "few ties"])
@pytest.mark.parametrize("count", [1, 2, 7, 10])
def test_it_is_the_mean_over_all_subsets_with_ties(count: int, levels: int):
    draws = np.random.default_rng(count * levels)
    rewards, values = draws.integers(levels, size=count).astype(float), draws.normal(size=count)
    sizes = list(range(1, count + 1))
    expected = [over_all_subsets(rewards, values, n) for n in sizes]
    assert expected_best(rewards, values, sizes) == pytest.approx(expected, abs=1e-12)


def test_the_order_of_the_samples_does_not_matter():
    rewards, values = [1.0, 1.0, 0.0, 2.0], [5.0, 1.0, 9.0, 2.0]
    one = expected_best(rewards, values, [1, 2, 3, 4])
    other = expected_best(rewards[::-1], values[::-1], [1, 2, 3, 4])
    assert one == pytest.approx(other)
    assert one[0] == pytest.approx(sum(values) / 4)
    assert one[-1] == 2.0


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_bias_is_below_1e_6(n: int):
    """The exact expectation over all 3^5 data sets of N = 5 samples from a distribution of three rewards with ties.

    Reward 0 has value 4, reward 1 has value 1 or 3, each with probability 1/4: the best of n has an exact expectation.
    """
    atoms = [(0.0, 4.0, 0.5), (1.0, 1.0, 0.25), (1.0, 3.0, 0.25)]
    estimate = 0.0
    for drawn in itertools.product(atoms, repeat=5):
        probability = math.prod(atom[2] for atom in drawn)
        rewards, values = [atom[0] for atom in drawn], [atom[1] for atom in drawn]
        estimate += probability * expected_best(rewards, values, [n])[0]
    # All n samples have reward 0 with probability 2^-n; else the best has reward 1, with mean value 2.
    exact = 4.0 * 0.5**n + 2.0 * (1 - 0.5**n)
    assert abs(estimate - exact) < 1e-6


def test_the_maximum_of_n_uniform_numbers_is_n_over_n_plus_1():
    """With rewards i / (N + 1), the means of order statistics of N uniforms, the estimate is exactly n / (n + 1)."""
    count = 4000
    rewards = np.arange(1, count + 1) / (count + 1)
    sizes = [1, 2, 3, 10, 100, 1999, 4000]
    assert expected_best(rewards, rewards, sizes) == pytest.approx([n / (n + 1) for n in sizes], abs=1e-12)


def test_a_uniform_reward_has_expectation_n_over_n_plus_1_over_data_sets():
    draws, sizes = np.random.default_rng(0), [1, 4, 16]
    found = np.mean([expected_best(row, row, sizes) for row in draws.random((4000, 32))], axis=0)
    assert found == pytest.approx([n / (n + 1) for n in sizes], abs=0.01)


def test_equal_rewards_choose_nothing():
    assert expected_best([3.0] * 6, [0, 1, 2, 3, 4, 5], [1, 2, 6]) == pytest.approx([2.5] * 3)


@pytest.mark.parametrize("sizes", [[0], [4], [1, 4]])
def test_sizes_beyond_the_samples_are_refused(sizes):
    with pytest.raises(ValueError, match="between 1 and 3"):
        expected_best([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], sizes)


def test_the_bound_is_the_kl_of_the_best_of_n_distinct_samples():
    assert kl_bound(1) == 0.0
    # The density of the best of n uniforms relative to one is n u^(n-1): its KL by the midpoint rule.
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (2, 8, 64):
        log_ratio = math.log(n) + (n - 1) * np.log(u)
        assert kl_bound(n) == pytest.approx(float(np.mean(np.exp(log_ratio) * log_ratio)), abs=1e-3)


def test_the_bound_is_above_the_kl_where_completions_repeat():
    """Two completions with probability 1/2: the best of n is the better one with probability 1 - 2^-n."""
    for n in (2, 4, 16):
        better = 1 - 0.5**n
        kl = better * math.log(2 * better) + (1 - better) * math.log(2 * (1 - better))
        assert kl < kl_bound(n)


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_sizes_double(count: int, sizes: list[int]):
    assert sizes_up_to(count) == sizes
