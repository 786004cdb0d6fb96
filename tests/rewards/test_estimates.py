"""Shares with intervals, by hand and against the interval of unweighted shares."""

from __future__ import annotations

import pytest

from rlhf_cli.intervals import jeffreys_interval, share_interval
from rlhf_cli.rewards.estimates import measured_share


def test_one_observation_per_prompt_has_the_interval_of_independent_ones():
    share = measured_share([(f"p{n}", float(n < 7), 1.0) for n in range(10)])
    assert share is not None
    assert (share.value, share.prompts, share.count) == (pytest.approx(0.7), 10, 10)
    assert (share.low, share.high) == pytest.approx(jeffreys_interval(0.7, 10))


def test_observations_of_one_prompt_are_added():
    share = measured_share([("p", 1.0, 1.0), ("p", 1.0, 1.0), ("q", 0.0, 1.0), ("q", 1.0, 1.0)])
    assert share is not None
    assert (share.value, share.prompts, share.count) == (0.75, 2, 4)
    assert (share.low, share.high) == share_interval([2.0, 1.0], [2.0, 2.0])


def test_only_the_ratios_of_weights_count():
    terms = [(f"p{n}", 0.5 * (n % 3), 1.0 + n % 2) for n in range(12)]
    plain, scaled = measured_share(terms), measured_share([(key, 7 * won, 7 * weight) for key, won, weight in terms])
    assert plain is not None
    assert scaled is not None
    assert scaled.value == pytest.approx(plain.value) == sum(won for _, won, _ in terms) / 18
    assert (scaled.low, scaled.high) == (pytest.approx(plain.low), pytest.approx(plain.high))


def test_nothing_has_no_share():
    assert measured_share([]) is None
