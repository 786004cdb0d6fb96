"""The length-controlled win rate on data with a known effect of length."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_cli.statistics.length_control import length_controlled_win_rate


def logistic(x):
    return 1 / (1 + np.exp(-x))


def judged(rng, prompts, theta, phi, *, samples=1, longer_by=30.0):
    """Preferences by the model of the paper: the policy writes about 30 tokens more."""
    difference = rng.normal(longer_by, 40.0, prompts * samples)
    keys = np.repeat(np.arange(prompts), samples)
    log_odds = theta + phi * np.tanh(difference / difference.std())
    return keys.tolist(), (rng.random(len(keys)) < logistic(log_odds)).astype(float), difference


def test_a_known_effect_of_length_is_taken_out():
    # Equal models, and a judge that prefers the longer completion: raw it looks much better.
    keys, wins, difference = judged(np.random.default_rng(0), 4000, 0.0, 1.5)
    found = length_controlled_win_rate(keys, wins, difference)
    assert wins.mean() > 0.62
    assert found.win_rate.value == pytest.approx(0.5, abs=0.03)
    assert found.length_effect == pytest.approx(1.5 * np.tanh(1.0), rel=0.15)
    assert not found.extrapolated


def test_without_an_effect_of_length_it_is_the_win_rate():
    keys, wins, difference = judged(np.random.default_rng(1), 4000, 0.8, 0.0)
    found = length_controlled_win_rate(keys, wins, difference)
    assert found.win_rate.value == pytest.approx(wins.mean(), abs=0.015)


def test_the_regression_by_hand():
    # Two lengths, d = +-s: the length term is +-tanh(1), and the two shares determine both coefficients exactly.
    wins = [1.0] * 8 + [0.0] * 2 + [1.0] * 3 + [0.0] * 7
    found = length_controlled_win_rate(range(20), wins, [10.0] * 10 + [-10.0] * 10)
    longer, shorter = np.log(8 / 2), np.log(3 / 7)
    assert found.win_rate.value == pytest.approx(logistic((longer + shorter) / 2))
    assert found.length_effect == pytest.approx((longer - shorter) / 2)
    again = length_controlled_win_rate(range(20), wins, [1.0] * 10 + [-1.0] * 10)
    assert again == found, "the unit of lengths does not matter"


def test_ties_are_a_half_and_sides_can_be_exchanged():
    rng = np.random.default_rng(2)
    wins, difference = rng.choice([0.0, 0.5, 1.0], 60), rng.normal(5.0, 10.0, 60)
    one = length_controlled_win_rate(range(60), wins, difference).win_rate
    other = length_controlled_win_rate(range(60), 1 - wins, -difference).win_rate
    assert one.value == pytest.approx(1 - other.value)
    assert one.low == pytest.approx(1 - other.high)


@pytest.mark.parametrize(
    ("prompts", "samples", "theta", "phi"),
    [
        (20, 1, 0.0, 1.0),
        (50, 1, 0.0, 1.0),
        (50, 1, 1.5, 1.0),
        (200, 1, 0.0, 1.0),
        (200, 1, 2.2, -1.0),
        (50, 4, 0.5, 1.0),
    ],
)
def test_its_interval_holds_the_truth(prompts, samples, theta, phi):
    rng, held, sets = np.random.default_rng(prompts + samples), 0, 0
    for _ in range(400):
        found = length_controlled_win_rate(*judged(rng, prompts, theta, phi, samples=samples)).win_rate
        if found.low is not None:
            sets += 1
            held += found.low <= logistic(theta) <= found.high
    assert sets > 330
    assert held / sets >= 0.925


def test_completions_of_one_prompt_do_not_narrow_the_interval():
    keys, wins, difference = judged(np.random.default_rng(3), 40, 0.3, 1.0)
    once = length_controlled_win_rate(keys, wins, difference).win_rate
    copies = length_controlled_win_rate(keys * 4, np.tile(wins, 4), np.tile(difference, 4)).win_rate
    assert copies.value == pytest.approx(once.value)
    assert (copies.low, copies.high, copies.n) == (pytest.approx(once.low), pytest.approx(once.high), 40)


@pytest.mark.parametrize(
    ("wins", "difference", "why"),
    [
        pytest.param([1, 0, 1, 0, 1], range(5), "fewer than 10 prompts", id="few prompts"),
        pytest.param([1] * 12, range(12), "won every time", id="all won"),
        pytest.param([0] * 12, range(12), "lost every time", id="all lost"),
        pytest.param([0.5] * 12, range(12), "tied every time", id="all tied"),
        pytest.param([1, 0] * 6, [3] * 12, "the same for all prompts", id="equal lengths"),
        pytest.param([1] * 6 + [0] * 6, range(6, -6, -1), "cannot be told apart", id="the longer one wins"),
        pytest.param([1] * 6 + [0] * 6, [9] * 6 + [-9] * 6, "cannot be told apart", id="two lengths"),
    ],
)
def test_what_the_data_do_not_determine_is_said(wins, difference, why):
    found = length_controlled_win_rate(range(len(wins)), [float(won) for won in wins], list(difference))
    assert found.win_rate.value is None
    assert why in found.win_rate.missing
    assert why in found.to_json()["missing"]


def test_equal_lengths_that_were_never_seen_are_an_extrapolation():
    rng = np.random.default_rng(4)
    wins, longer_by = rng.choice([0.0, 1.0], 100), rng.uniform(5, 80, 100)
    found = length_controlled_win_rate(range(100), wins, longer_by)
    assert found.extrapolated
    assert found.win_rate.low < found.win_rate.value < found.win_rate.high
    far = length_controlled_win_rate(range(100), wins, longer_by + 500)
    assert far.extrapolated
    assert "far longer completions" in far.win_rate.missing
