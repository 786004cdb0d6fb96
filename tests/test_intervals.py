"""Intervals of shares, by hand and by simulation: they hold the truth as often as they say, however few the prompts."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_cli.intervals import PromptSums, exact_interval, is_undecided, share_interval, worth_of


def single(values):
    return share_interval(values, [1.0] * len(values))


def test_the_exact_interval_by_hand():
    # Clopper and Pearson (1934): n of n begins at (1 - level / 2)^(1/n); 5 of 10 is the textbook's 0.1871 to 0.8129.
    assert exact_interval(1.0, 10) == (pytest.approx(0.025**0.1), 1.0)
    assert exact_interval(0.0, 10) == (0.0, pytest.approx(1 - 0.025**0.1))
    assert exact_interval(0.5, 10) == (pytest.approx(0.187086, abs=1e-6), pytest.approx(0.812914, abs=1e-6))
    assert exact_interval(1.0, 10, level=0.99)[0] == pytest.approx(0.005**0.1)
    # A large count, where the interval is that of the normal approximation.
    low, high = exact_interval(0.3, 1e6)
    assert (high - low) / 2 == pytest.approx(1.96 * (0.3 * 0.7 / 1e6) ** 0.5, rel=1e-3)


def test_ten_of_ten_is_not_certain():
    assert single([1.0] * 10) == (pytest.approx(0.6915, abs=1e-4), 1.0)
    assert share_interval([7.0, 7.0], [7.0, 7.0]) == (pytest.approx(0.025**0.5), 1.0), (
        "two prompts, whatever their pairs"
    )


def _binary(rng, n, p):
    return (rng.random(n) < p).astype(float), np.ones(n)


def _ties(rng, n, p):
    tie = 0.6 * min(p, 1 - p)
    drawn = rng.random(n)
    return np.where(drawn < p - tie / 2, 1.0, np.where(drawn < p + tie / 2, 0.5, 0.0)), np.ones(n)


def _clustered(rng, n, p):
    pairs = rng.integers(1, 7, n)
    return rng.binomial(pairs, rng.beta(3 * p, 3 * (1 - p), n)).astype(float), pairs.astype(float)


@pytest.mark.parametrize("draw", [_binary, _ties, _clustered])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.9, 0.98])
@pytest.mark.parametrize("prompts", [5, 10, 25, 60])
def test_95_percent_intervals_hold_the_truth(draw, share, prompts):
    rng, sets = np.random.default_rng(prompts), 300
    held = 0
    for _ in range(sets):
        low, high = share_interval(*draw(rng, prompts, share))
        held += low <= share <= high
    assert held >= 0.93 * sets, f"{held} of {sets}"


def test_intervals_are_not_needlessly_wide():
    # The normal approximation of 600 prompts with half of them won, and of means of four values that vary little.
    low, high = single([0.0, 1.0] * 300)
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 600) ** 0.5, rel=0.05)
    low, high = share_interval([1.0, 3.0] * 100, [4.0] * 200)
    assert high - low == pytest.approx(2 * 1.96 * 0.25 / 200**0.5, rel=0.05)


def test_worth_of_prompts():
    ones = np.arange(200)
    # 100 of 200 single pairs: as good as independent, but for the freedom that 199 leave.
    single = worth_of(PromptSums(ones, np.column_stack([ones % 2, np.ones(200)]).astype(float)))
    assert single == pytest.approx(200, rel=0.03)
    # Ten pairs a prompt, all alike: each prompt counts once.
    alike = worth_of(PromptSums(ones, np.column_stack([10 * (ones % 2), np.full(200, 10)]).astype(float)))
    assert alike == pytest.approx(200, rel=0.03)
    # Four prompts leave three degrees of freedom: t is 3.182 where the normal has 1.96. At least one a prompt remains.
    half = worth_of(PromptSums(ones[:4], np.column_stack([[2.0, 3.0, 5.0, 6.0], np.full(4, 8.0)])))
    assert half == pytest.approx(0.25 * 3 / 4 / (10 / 32**2) * (1.96 / 3.182) ** 2, rel=0.02)
    assert worth_of(PromptSums(ones[:4], np.column_stack([ones[:4] % 2, np.ones(4)]).astype(float))) == 4.0
    # Nothing varies: Kish's number.
    same = worth_of(PromptSums(ones[:2], np.array([[3.0, 3.0], [1.0, 1.0]])))
    assert same == pytest.approx(16 / 10)


def test_an_interval_that_contains_a_half_decides_nothing():
    assert is_undecided(0.0, 1.0)
    assert is_undecided(0.5, 0.7)
    assert not is_undecided(0.51, 0.7)
    assert not is_undecided(0.1, 0.49)
