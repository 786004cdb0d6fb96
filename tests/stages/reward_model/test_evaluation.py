"""Agreement of rewards with rankings, by hand."""

from __future__ import annotations

import json
import math

import pytest

from rlhf_cli.data.records import Ranking
from rlhf_cli.errors import DataError
from rlhf_cli.intervals import standard_error
from rlhf_cli.stages.reward_model.evaluation import accuracy, ranking_report

THREE = Ranking("p", ("longest", "mid", "s"), ((1,), (0,), (2,)))
TIED = Ranking("q", ("aa", "b", "cccc"), ((0, 1), (2,)))


def test_pairs_and_accuracy_by_hand():
    # THREE: 1>0, 1>2, 0>2 with rewards 2, 1, 0: wrong, right, right. TIED: 0>2 right (3 > 1), 1>2 equal.
    report = ranking_report([THREE, TIED], [[2.0, 1.0, 0.0], [3.0, 1.0, 1.0]])
    assert report.ties == 1
    assert (report.accuracy.count, report.accuracy.prompts) == (5, 2)
    assert report.accuracy.value == pytest.approx((0 + 1 + 1 + 1 + 0.5) / 5)
    near, far = report.by_distance
    assert (near.low, near.high, near.mean, far.low) == (1, 1, 1, 2)
    assert (near.accuracy.value, near.accuracy.count) == (pytest.approx((0 + 1 + 1 + 0.5) / 4), 4)
    assert (far.accuracy.value, far.accuracy.count) == (1.0, 1)
    assert report.mean_best == pytest.approx((1.0 + 3.0 + 1.0) / 3)
    assert report.mean_worst == pytest.approx((0.0 + 1.0) / 2)
    assert accuracy([THREE], [[2.0, 1.0, 0.0]]) == pytest.approx(2 / 3)


def test_the_length_baseline_is_on_the_same_pairs():
    # THREE: mid beats longest (shorter), mid and longest beat s (longer). TIED: aa and b beat cccc (shorter).
    report = ranking_report([THREE, TIED], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert report.always_longer.value == pytest.approx(2 / 5)
    assert report.accuracy.value == 0.5, "equal rewards are half right"


def test_answers_of_equal_length_are_half_right_for_the_baseline_and_in_no_length_subset():
    report = ranking_report([Ranking("p", ("aa", "bb"), ((0,), (1,)))], [[1.0, 0.0]])
    assert report.always_longer.value == 0.5
    assert report.longer_chosen is report.shorter_chosen is None


def test_accuracy_where_the_longer_and_where_the_shorter_completion_is_better():
    # THREE with rewards 2, 1, 0: mid > longest is wrong (shorter chosen); both others are right (longer chosen).
    report = ranking_report([THREE, TIED], [[2.0, 1.0, 0.0], [3.0, 1.0, 1.0]])
    assert report.longer_chosen is not None
    assert report.shorter_chosen is not None
    assert (report.longer_chosen.value, report.longer_chosen.count) == (1.0, 2)
    assert (report.shorter_chosen.value, report.shorter_chosen.count) == (pytest.approx((0 + 1 + 0.5) / 3), 3)


def preferences(margins, differences):
    rankings = [Ranking(f"p{n}", ("a", "b"), ((0,), (1,)), margin=margin) for n, margin in enumerate(margins)]
    return rankings, [[difference, 0.0] for difference in differences]


def test_a_few_label_margins_have_one_bin_each_and_many_have_four():
    report = ranking_report(*preferences([1.0, 1 / 3, 1.0, None, 1.0], [1.0, -1.0, 2.0, 1.0, -2.0]))
    assert [(one.mean, one.accuracy.count, one.accuracy.value) for one in report.by_label_margin] == [
        (pytest.approx(1 / 3), 1, 0.0),
        (1.0, 3, pytest.approx(2 / 3)),
    ]
    report = ranking_report(*preferences([0.1 * n for n in range(8)], [1.0] * 4 + [-1.0] * 4))
    assert [one.accuracy.count for one in report.by_label_margin] == [2, 2, 2, 2]
    assert [one.accuracy.value for one in report.by_label_margin] == [1.0, 1.0, 0.0, 0.0]
    assert (report.by_label_margin[1].low, report.by_label_margin[1].high) == (pytest.approx(0.2), pytest.approx(0.3))


def test_a_margin_is_of_the_pairs_that_the_first_tier_wins():
    ranking = Ranking("p", ("a", "b", "c"), ((0,), (1,), (2,)), margin=2.0)
    report = ranking_report([ranking], [[0.0, 1.0, 2.0]])
    assert [(one.mean, one.accuracy.count) for one in report.by_label_margin] == [(2.0, 2)]


def test_without_margins_there_are_no_bins_of_them():
    assert ranking_report([THREE], [[2.0, 1.0, 0.0]]).by_label_margin == []


def test_predicted_margins_are_cut_at_their_quartiles_and_equal_ones_stay_together():
    report = ranking_report(*preferences([None] * 8, [0.1, -0.2, 0.3, -0.4, 1.0, 1.0, 1.0, -1.0]))
    found = [(one.low, one.high, one.accuracy.count, one.accuracy.value) for one in report.by_predicted_margin]
    assert found == [(0.1, 0.2, 2, 0.5), (0.3, 0.4, 2, 0.5), (1.0, 1.0, 4, 0.75)]


def test_calibration_error_by_hand():
    pair = Ranking("p", ("a", "b"), ((0,), (1,)))
    # Confidence sigmoid(log 4) = 0.8 on both; one of two is right: |0.8 - 0.5|.
    report = ranking_report([pair, Ranking("q", ("a", "b"), ((1,), (0,)))], [[math.log(4), 0.0], [math.log(4), 0.0]])
    assert report.calibration.error.value == pytest.approx(0.3)
    assert report.calibration.if_calibrated == pytest.approx(math.sqrt(2 / math.pi * 2 * 0.8 * 0.2) / 2)
    (only,) = report.reliability
    assert (only.low, only.high, only.mean) == (pytest.approx(0.8), pytest.approx(0.85), pytest.approx(0.8))
    assert only.accuracy.value == 0.5


def test_calibration_error_adds_the_bins_by_their_sizes():
    # Confidence 0.9, both right: a surplus of -0.1 each. Confidence 0.6, wrong: +0.6. (0.2 + 0.6) / 3.
    report = ranking_report(*preferences([None] * 3, [math.log(9), math.log(9), -math.log(1.5)]))
    assert report.calibration.error.value == pytest.approx(0.8 / 3)


def test_the_interval_of_a_calibration_error_contains_it_and_that_of_one_prompt_says_nothing():
    error = ranking_report(*preferences([None] * 40, [math.log(4)] * 32 + [-math.log(4)] * 8)).calibration.error
    assert error.low <= error.value <= error.high
    assert error.value == pytest.approx(0.0, abs=1e-12)
    assert 0.05 < error.high < 0.2
    overconfident = ranking_report(*preferences([None] * 40, [5.0] * 20 + [-5.0] * 20)).calibration.error
    assert 0.2 < overconfident.low < overconfident.value < overconfident.high < 0.8
    one = ranking_report([THREE], [[2.0, 1.0, 0.0]]).calibration.error
    assert (one.low, one.high) == (0.0, 1.0)


def test_a_report_is_json_with_an_interval_for_each_figure():
    written = json.loads(json.dumps(ranking_report(*preferences([1.0, 0.5], [1.0, -1.0])).to_json(), allow_nan=False))
    assert set(written["metrics"]) == {"accuracy", "always_longer", "calibration_error"}
    assert set(written["metrics"]["accuracy"]) == {"value", "low", "high", "prompts", "count"}
    for name in ("by_distance", "by_label_margin", "by_predicted_margin", "reliability"):
        assert all(one["accuracy"]["low"] <= one["accuracy"]["value"] for one in written[name])


def test_a_prompt_ranked_twice_is_one_prompt():
    again = Ranking("p", THREE.completions, THREE.tiers)
    assert ranking_report([THREE, again], [[1.0, 2.0, 0.0]] * 2).accuracy.prompts == 1


def test_nothing_but_ties_is_an_error():
    with pytest.raises(DataError, match="every pair is a tie"):
        ranking_report([Ranking("p", ("a", "b"), ((0, 1),))], [[0.0, 1.0]])


def test_standard_error_by_hand():
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)
    assert standard_error([2.0]) == 0.0
