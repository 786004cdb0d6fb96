"""Paired tests by hand and by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_cli.statistics.paired import by_prompt, mean_of, paired_difference, ratio_of_sums, sign_test


def test_the_sign_test_by_hand():
    # 9 of 10: 2 (C(10,0) + C(10,1)) / 2^10 = 22 / 1024.
    found = sign_test([0.5] * 9 + [-0.5])
    assert (found.wins, found.losses, found.ties) == (9, 1, 0)
    assert found.p_value == pytest.approx(22 / 1024)
    assert sign_test([-0.5] * 9 + [0.5]).p_value == pytest.approx(22 / 1024), "two-sided"
    assert sign_test([0.5] * 9 + [-0.5] + [0.0] * 50).p_value == pytest.approx(22 / 1024), "ties say nothing"
    assert sign_test([1.0, 1.0, -1.0, -1.0]).p_value == 1.0
    assert sign_test([0.0]).p_value == 1.0
    assert sign_test([1.0] * 6).p_value == pytest.approx(2 / 64)


def test_the_sign_test_rejects_at_most_as_often_as_it_says():
    rng = np.random.default_rng(0)
    p_values = [sign_test(np.sign(rng.random(25) - 0.5)).p_value for _ in range(2000)]
    assert np.mean(np.array(p_values) <= 0.05) <= 0.065
    assert min(p_values) < 0.05


def test_the_paired_difference_by_hand():
    # Mean 3, deviation 1.5811, error 0.7071, t with 4 degrees of freedom 2.7764.
    found = paired_difference([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean.value, found.mean.n) == (3.0, 5)
    assert found.standard_error == pytest.approx(0.5**0.5)
    assert found.mean.low == pytest.approx(3 - 2.776445 * 0.5**0.5, abs=1e-5)
    assert found.mean.high == pytest.approx(3 + 2.776445 * 0.5**0.5, abs=1e-5)
    assert found.p_value == pytest.approx(0.0132, abs=1e-4), "t = 4.243 with 4 degrees of freedom"
    assert set(found.to_json()) == {"value", "low", "high", "n", "standard_error", "p_value"}


@pytest.mark.parametrize(("values", "why"), [([2.0], "one prompt"), ([2.0, 2.0, 2.0], "equal")])
def test_no_spread_is_no_certainty(values, why):
    found = paired_difference(values)
    assert (found.mean.value, found.mean.low, found.mean.high, found.p_value) == (2.0, None, None, None)
    assert why in found.to_json()["missing"]


@pytest.mark.parametrize("prompts", [10, 20, 50, 200])
def test_intervals_of_differences_hold_the_truth(prompts):
    rng = np.random.default_rng(prompts)
    held = 0
    for _ in range(2000):
        found = mean_of(rng.normal(0.3, 2.0, prompts).tolist())
        held += found.low <= 0.3 <= found.high
    assert held / 2000 == pytest.approx(0.95, abs=0.02)


def test_completions_of_a_prompt_are_one_value():
    assert by_prompt(["p", "q", "p"], [1.0, 5.0, 3.0]) == [2.0, 5.0]


def test_a_ratio_of_sums_by_hand():
    # r = 9 / 6; the moves a - r b are -0.5, 1, -0.5: deviation 0.866, error 3^0.5 0.866 / 6 = 0.25; t is 4.303.
    found = ratio_of_sums([1.0, 4.0, 4.0], [1.0, 2.0, 3.0])
    assert (found.value, found.n) == (1.5, 3)
    assert found.high - found.value == pytest.approx(4.30265 * 0.25, abs=1e-4)
    assert found.value - found.low == pytest.approx(4.30265 * 0.25, abs=1e-4)


def test_the_interval_of_a_ratio_holds_the_truth():
    rng, held = np.random.default_rng(0), 0
    for _ in range(500):
        tokens = rng.integers(5, 50, 40)
        nats = tokens * rng.gamma(4.0, 0.25, 40) * 2.0
        found = ratio_of_sums(nats.tolist(), tokens.tolist())
        held += found.low <= 2.0 <= found.high
    assert held / 500 == pytest.approx(0.95, abs=0.03)
