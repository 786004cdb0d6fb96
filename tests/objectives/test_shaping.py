"""What becomes of a reward before it is trained on, by hand."""

import math

import pytest
import torch

from rlhf_cli.objectives.shaping import RewardShape, RunningMoments


def test_rewards_are_scaled_clipped_and_penalized_in_that_order():
    scores, ended = torch.tensor([4.0, -4.0, 1.0]), torch.tensor([True, True, False])
    lengths = torch.tensor([1, 2, 3])
    shape = RewardShape(clip=3.0, missing_eos_penalty=5.0, length_penalty=0.5)
    assert shape.apply(scores, ended, lengths, scale=0.5).tolist() == pytest.approx([1.5, -3.0, 0.5 - 5.0 - 1.5])
    assert shape.apply(scores, ended, lengths).tolist() == pytest.approx([2.5, -4.0, 1.0 - 5.0 - 1.5])
    replaced = RewardShape(missing_eos_reward=-1.0)
    assert replaced.apply(scores, ended, lengths).tolist() == [4.0, -4.0, -1.0]


def test_running_moments_are_those_of_everything_seen():
    rewards = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0]
    moments = RunningMoments()
    for part in (rewards[:3], [], rewards[3:4], rewards[4:]):
        moments = moments.including(part)
    everything = torch.tensor(rewards, dtype=torch.float64)
    assert moments.count == 7
    assert moments.mean == pytest.approx(float(everything.mean()))
    assert moments.std == pytest.approx(float(everything.std(correction=0)))
    assert RunningMoments().std == RunningMoments().including([2.0, 2.0]).std == 1.0


def test_a_penalty_for_a_missing_end_and_a_bonus_for_length():
    scores, ended, lengths = torch.tensor([1.0, 1.0]), torch.tensor([True, False]), torch.tensor([4, 6])
    shape = RewardShape(missing_eos_penalty=0.25, length_penalty=-0.1)
    assert shape.apply(scores, ended, lengths).tolist() == pytest.approx([1.4, 1.35])


def test_a_broken_score_stays_broken_unless_it_is_replaced():
    scores, ended, lengths = torch.tensor([math.nan, math.nan]), torch.tensor([True, False]), torch.tensor([1, 1])
    assert RewardShape(clip=1.0).apply(scores, ended, lengths).isnan().all()
    assert RewardShape(missing_eos_reward=-2.0).apply(scores, ended, lengths)[1] == -2.0
