"""Intervals over prompts and over seeds: by hand, and how often they contain what they should."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_cli.statistics.paired import NO_SPREAD
from rlhf_cli.statistics.seeds import group_difference


def test_a_paired_difference_by_hand():
    """Differences 1, 3 and 2, 6: means 2 and 4 of the runs, 1.5 and 4.5 of the prompts; t of one degree is 12.706."""
    found = group_difference(np.zeros((2, 2)), np.array([[1.0, 3.0], [2.0, 6.0]]), is_paired=True)
    assert (found.first, found.second) == (0.0, 3.0)
    assert (found.prompts.low, found.prompts.high) == pytest.approx((3 - 12.706 * 1.5, 3 + 12.706 * 1.5), rel=1e-4)
    assert (found.seeds.low, found.seeds.high) == pytest.approx((3 - 12.706, 3 + 12.706), rel=1e-4)
    # Residuals are +-1/2, mean square 1, over 4 entries 0.25: 1.5^2 + 1 - 0.25 = 3, and 3^2 / (2.25^2 + 1 + 0.25^2).
    freedom = 9 / (2.25**2 + 1 + 0.25**2)
    assert freedom == pytest.approx(1.469, rel=1e-3)
    assert found.both.high == pytest.approx(3 + 6.1954 * 3**0.5, rel=1e-3)
    assert found.seeds.n == found.both.n == found.prompts.n == 2


def test_unpaired_runs_are_compared_as_welch_does():
    first, second = np.array([[0.0, 0.0], [2.0, 2.0]]), np.array([[5.0, 5.0], [5.0, 5.0], [5.0, 5.0]])
    found = group_difference(first, second, is_paired=False)
    assert found.seeds.value == 4.0
    assert found.seeds.high == pytest.approx(4 + 12.706, rel=1e-4), "variance 2 / 2 of one degree, and 0"
    assert found.prompts.missing == NO_SPREAD, "the same difference on every prompt has no interval"


@pytest.mark.parametrize("is_paired", [True, False])
def test_one_run_per_group_has_no_interval_over_seeds(is_paired):
    found = group_difference(np.array([[0.0, 1.0, 0.0]]), np.array([[1.0, 1.0, 1.0]]), is_paired=is_paired)
    assert found.seeds.low is None
    assert found.both.missing == found.seeds.missing
    assert "one run" in (found.seeds.missing or "")
    assert found.prompts.low is not None


def test_one_prompt_has_no_interval_over_prompts():
    found = group_difference(np.array([[0.0], [1.0]]), np.array([[1.0], [3.0]]), is_paired=True)
    assert found.prompts.missing == found.both.missing == "there is one prompt"


@pytest.mark.parametrize("is_paired", [True, False], ids=["paired", "unpaired"])
@pytest.mark.parametrize(("runs", "prompts"), [(3, 20), (3, 100), (5, 50)])
def test_intervals_contain_what_they_are_for(runs, prompts, is_paired):
    """1,000 comparisons in which prompts, seeds and their interaction vary; a standard error of 0.7 points."""
    generator = np.random.default_rng(0)
    contained = np.zeros(3)
    for _ in range(1000):
        by_prompt, by_run = generator.normal(0, 1.0, (2, 1, prompts)), generator.normal(0, 0.3, (2, runs, 1))
        rest = generator.normal(0, 1.0, (2, runs, prompts))
        groups = by_prompt + by_run + rest
        found = group_difference(groups[0], groups[1], is_paired=is_paired)
        of_seeds = float((by_run[1] - by_run[0]).mean())  # what other prompts would show of these models
        of_prompts = float((by_prompt[1] - by_prompt[0]).mean())
        for number, (measure, truth) in enumerate(
            ((found.prompts, of_seeds), (found.seeds, of_prompts), (found.both, 0.0))
        ):
            assert measure.low is not None
            assert measure.high is not None
            contained[number] += measure.low <= truth <= measure.high
    over_prompts, over_seeds, over_both = contained / 1000
    assert 0.93 <= over_prompts <= 0.97
    assert 0.93 <= over_seeds <= 0.985, "Welch's is conservative with three runs"
    assert 0.93 <= over_both <= 0.985
