"""Agreement of rewards with rankings, by hand."""

from __future__ import annotations

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
    assert report.pairs == 5
    assert report.ties == 1
    assert report.prompts == 2
    assert report.accuracy == pytest.approx((0 + 1 + 1 + 1 + 0.5) / 5)
    assert report.by_distance == {1: (pytest.approx((0 + 1 + 1 + 0.5) / 4), 4), 2: (1.0, 1)}
    assert report.mean_best == pytest.approx((1.0 + 3.0 + 1.0) / 3)
    assert report.mean_worst == pytest.approx((0.0 + 1.0) / 2)
    assert accuracy([THREE], [[2.0, 1.0, 0.0]]) == pytest.approx(2 / 3)


def test_length_baselines_are_on_the_same_pairs_and_add_to_one():
    # THREE: mid beats longest (shorter), mid and longest beat s (longer). TIED: aa and b beat cccc (shorter).
    report = ranking_report([THREE, TIED], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert report.always_longer == pytest.approx(2 / 5)
    assert report.always_shorter == pytest.approx(3 / 5)
    assert report.accuracy == 0.5, "equal rewards are half right"


def test_answers_of_equal_length_are_half_right_for_both_baselines():
    report = ranking_report([Ranking("p", ("aa", "bb"), ((0,), (1,)))], [[1.0, 0.0]])
    assert report.always_longer == report.always_shorter == 0.5


def test_calibration_error_by_hand():
    pair = Ranking("p", ("a", "b"), ((0,), (1,)))
    # Confidence sigmoid(log 4) = 0.8 on both; one of two is right: |0.8 - 0.5|.
    report = ranking_report([pair, Ranking("q", ("a", "b"), ((1,), (0,)))], [[math.log(4), 0.0], [math.log(4), 0.0]])
    assert report.calibration_error == pytest.approx(0.3)


def test_a_prompt_ranked_twice_is_one_prompt():
    again = Ranking("p", THREE.completions, THREE.tiers)
    assert ranking_report([THREE, again], [[1.0, 2.0, 0.0]] * 2).prompts == 1


def test_nothing_but_ties_is_an_error():
    with pytest.raises(DataError, match="every pair is a tie"):
        ranking_report([Ranking("p", ("a", "b"), ((0, 1),))], [[0.0, 1.0]])


def test_standard_error_by_hand():
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)
    assert standard_error([2.0]) == 0.0
