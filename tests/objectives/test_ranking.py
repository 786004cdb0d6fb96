"""Ranking losses against hand computation and brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rlhf_cli.objectives.ranking import (
    batch_mean_penalty,
    centering_penalty,
    pairs_of,
    pairwise_ranking_loss,
    plackett_luce_loss,
)


def tensors(rewards, levels, groups=None):
    groups = [0] * len(rewards) if groups is None else groups
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(levels), torch.tensor(groups)


def minus_log_sigmoid(difference: float) -> float:
    return math.log1p(math.exp(-difference))


@pytest.mark.parametrize(
    ("rewards", "levels", "expected"),
    [
        pytest.param([2.0, 0.5], [0, 1], minus_log_sigmoid(1.5), id="a pair, rightly ordered"),
        pytest.param([2.0, 0.5], [1, 0], minus_log_sigmoid(-1.5), id="a pair, wrongly ordered"),
        pytest.param([1.0, 1.0], [0, 1], math.log(2), id="equal rewards"),
        pytest.param(
            [1.0, 3.0, 0.0],
            [1, 0, 2],
            (minus_log_sigmoid(2.0) + minus_log_sigmoid(3.0) + minus_log_sigmoid(1.0)) / 3,
            id="three answers: the mean over C(3,2) = 3 pairs",
        ),
        pytest.param([1.0, 3.0], [0, 0], (minus_log_sigmoid(2.0) + minus_log_sigmoid(-2.0)) / 2, id="a tie"),
        pytest.param(
            [1.0, 3.0, 0.0],
            [0, 0, 1],
            ((minus_log_sigmoid(2.0) + minus_log_sigmoid(-2.0)) / 2 + minus_log_sigmoid(1.0) + minus_log_sigmoid(3.0))
            / 3,
            id="a tie at the top counts among the three pairs",
        ),
    ],
)
def test_pairwise_loss_is_instructgpt_equation_1(rewards, levels, expected):
    assert pairwise_ranking_loss(*tensors(rewards, levels)).tolist() == pytest.approx([expected], abs=1e-12)


def test_each_group_has_its_own_mean_whatever_its_size():
    rewards, levels, groups = tensors([2.0, 0.5, 1.0, 3.0, 0.0], [0, 1, 1, 0, 2], [0, 0, 1, 1, 1])
    losses = pairwise_ranking_loss(rewards, levels, groups)
    three = (minus_log_sigmoid(2.0) + minus_log_sigmoid(3.0) + minus_log_sigmoid(1.0)) / 3
    assert losses.tolist() == pytest.approx([minus_log_sigmoid(1.5), three], abs=1e-12)


def test_groups_need_not_lie_together():
    together = pairwise_ranking_loss(*tensors([2.0, 0.5, 1.0, 3.0], [0, 1, 1, 0], [0, 0, 1, 1]))
    apart = pairwise_ranking_loss(*tensors([2.0, 1.0, 0.5, 3.0], [0, 1, 1, 0], [0, 1, 0, 1]))
    assert apart.tolist() == pytest.approx(together.tolist(), abs=1e-12)


def test_margin_is_subtracted_where_the_best_tier_wins():
    rewards, levels, groups = tensors([1.0, 3.0, 0.0], [1, 0, 2])
    loss = pairwise_ranking_loss(rewards, levels, groups, torch.tensor([0.5], dtype=torch.float64))
    expected = (minus_log_sigmoid(2.0 - 0.5) + minus_log_sigmoid(3.0 - 0.5) + minus_log_sigmoid(1.0)) / 3
    assert loss.tolist() == pytest.approx([expected], abs=1e-12)


def test_margin_leaves_ties_alone():
    rewards, levels, groups = tensors([1.0, 3.0], [0, 0])
    margin = torch.tensor([5.0], dtype=torch.float64)
    assert torch.equal(
        pairwise_ranking_loss(rewards, levels, groups, margin), pairwise_ranking_loss(rewards, levels, groups)
    )


def test_a_tie_is_cheapest_at_equal_rewards():
    equal = pairwise_ranking_loss(*tensors([1.0, 1.0], [0, 0])).item()
    assert equal == pytest.approx(math.log(2))
    for gap in (0.1, -0.1, 3.0):
        assert pairwise_ranking_loss(*tensors([1.0 + gap, 1.0], [0, 0])).item() > equal


def test_huge_differences_stay_finite():
    loss = pairwise_ranking_loss(*tensors([-1e4, 1e4], [0, 1]))
    assert loss.item() == pytest.approx(2e4)


def test_pairs_are_counted_once():
    first, second = pairs_of(torch.tensor([0, 1, 0, 1, 0]))
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 2), (0, 4), (1, 3), (2, 4)]


def brute_force_tiers(rewards: list[float], levels: list[int]) -> float:
    """Sum of the probabilities of all full orders that keep the tiers apart."""
    total = 0.0
    for order in itertools.permutations(range(len(rewards))):
        ordered = [levels[index] for index in order]
        if ordered != sorted(ordered):
            continue
        probability = 1.0
        for place, index in enumerate(order):
            probability *= math.exp(rewards[index]) / sum(math.exp(rewards[other]) for other in order[place:])
        total += probability
    return -math.log(total)


@pytest.mark.parametrize(
    ("rewards", "levels"),
    [
        pytest.param([0.3, -1.2], [0, 1], id="a pair"),
        pytest.param([0.3, -1.2, 0.9, 2.0], [2, 0, 3, 1], id="no ties"),
        pytest.param([0.3, -1.2, 0.9], [0, 0, 1], id="a tie at the top"),
        pytest.param([0.3, -1.2, 0.9], [0, 1, 1], id="a tie at the bottom"),
        pytest.param([0.3, -1.2, 0.9, 2.0, -0.4, 1.1], [1, 0, 1, 2, 1, 0], id="several ties"),
        pytest.param([0.3, -1.2, 0.9, 2.0, -0.4, 1.1], [0, 0, 0, 0, 0, 1], id="a tie of five"),
    ],
)
def test_plackett_luce_is_the_exact_sum_over_orders(rewards, levels):
    loss = plackett_luce_loss(*tensors(rewards, levels))
    assert loss.tolist() == pytest.approx([brute_force_tiers(rewards, levels)], abs=1e-12)


def test_plackett_luce_probabilities_of_all_tier_shapes_sum_to_one():
    rewards = [0.3, -1.2, 0.9, 2.0]
    shapes = set(itertools.permutations([0, 0, 1, 2]))
    total = sum(math.exp(-plackett_luce_loss(*tensors(rewards, levels)).item()) for levels in shapes)
    assert total == pytest.approx(1.0)


def test_plackett_luce_of_a_pair_is_the_pairwise_loss():
    pair = tensors([0.3, -1.2], [1, 0])
    assert plackett_luce_loss(*pair).item() == pytest.approx(pairwise_ranking_loss(*pair).item())


def test_plackett_luce_learns_nothing_from_a_tie_of_all():
    rewards, levels, groups = tensors([0.3, -1.2, 0.9], [0, 0, 0])
    rewards.requires_grad_(True)
    loss = plackett_luce_loss(rewards, levels, groups)
    assert loss.item() == 0.0
    loss.sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [0.0, 0.0, 0.0]


def test_plackett_luce_stays_finite_far_out():
    rewards, levels, groups = tensors([-500.0, 500.0, 0.0], [0, 0, 1])
    rewards.requires_grad_(True)
    loss = plackett_luce_loss(rewards, levels, groups)
    loss.sum().backward()
    assert loss.item() == pytest.approx(500.0)
    assert torch.isfinite(rewards.grad).all()


LOSSES = [pairwise_ranking_loss, plackett_luce_loss]


@pytest.mark.parametrize("loss", LOSSES)
def test_only_differences_matter(loss):
    rewards, levels, groups = tensors([0.3, -1.2, 0.9, 2.0, 1.0], [1, 0, 1, 0, 1], [0, 0, 0, 1, 1])
    shift = torch.tensor([7.0, 7.0, 7.0, -3.0, -3.0], dtype=torch.float64)
    assert loss(rewards + shift, levels, groups).tolist() == pytest.approx(loss(rewards, levels, groups).tolist())


@pytest.mark.parametrize("loss", LOSSES)
def test_the_order_in_which_answers_stand_does_not_matter(loss):
    rewards, levels, groups = tensors([0.3, -1.2, 0.9, 2.0], [1, 0, 1, 2])
    expected = loss(rewards, levels, groups).item()
    for order in itertools.permutations(range(4)):
        picked = list(order)
        assert loss(rewards[picked], levels[picked], groups).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss):
    rewards, levels, groups = tensors([0.3, -1.2, 0.9, 2.0, 1.0], [1, 0, 1, 0, 1], [0, 0, 0, 1, 1])
    rewards.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda values: loss(values, levels, groups), (rewards,))
    assert torch.autograd.gradgradcheck(lambda values: loss(values, levels, groups), (rewards,))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_against_the_gradient_puts_the_better_answer_ahead(loss):
    rewards, levels, groups = tensors([0.0, 0.0, 0.0], [2, 0, 1])
    rewards.requires_grad_(True)
    loss(rewards, levels, groups).sum().backward()
    moved = (-rewards.grad).tolist()
    assert moved[1] > moved[2] > moved[0]


def test_centering_is_the_mean_over_pairs_of_the_squared_sum():
    # A pair: (2 - 0.5)^2. Three: ((1 + 3)^2 + (1 - 2)^2 + (3 - 2)^2) / 3.
    rewards, _, groups = tensors([2.0, -0.5, 1.0, 3.0, -2.0], [0] * 5, [0, 0, 1, 1, 1])
    assert centering_penalty(rewards, groups).tolist() == pytest.approx([2.25, 6.0], abs=1e-12)


def test_centering_of_pairs_is_the_term_of_trl():
    chosen, rejected = torch.randn(2, 6, dtype=torch.float64)
    rewards, groups = torch.stack([chosen, rejected], dim=1).flatten(), torch.arange(6).repeat_interleave(2)
    expected = torch.mean((chosen + rejected) ** 2)
    assert float(centering_penalty(rewards, groups).mean()) == pytest.approx(float(expected))


def test_centering_gradient():
    rewards, _, groups = tensors([2.0, -0.5, 1.0, 3.0, -2.0], [0] * 5, [0, 0, 1, 1, 1])
    assert torch.autograd.gradcheck(lambda x: centering_penalty(x, groups), rewards.requires_grad_(True))


def test_the_shares_of_a_batch_mean_average_to_its_square_with_its_gradient():
    rewards, _, groups = tensors([2.0, -0.5, 1.0, 3.0, -2.0], [0] * 5, [0, 0, 1, 1, 1])
    rewards.requires_grad_(True)
    square = rewards.mean().square()
    (expected,) = torch.autograd.grad(square, rewards)
    shares = batch_mean_penalty(rewards, groups, mean=0.7, completions=5, count=2)
    (found,) = torch.autograd.grad(shares.mean(), rewards)
    assert float(shares.mean().detach()) == pytest.approx(float(square.detach())) == pytest.approx(0.49)
    assert expected.tolist() == pytest.approx([2 * 0.7 / 5] * 5)
    assert found.tolist() == pytest.approx(expected.tolist())


def test_a_batch_mean_is_the_same_in_parts():
    rewards, _, groups = tensors([2.0, -0.5, 1.0, 3.0, -2.0], [0] * 5, [0, 0, 1, 1, 1])
    whole = batch_mean_penalty(rewards, groups, mean=0.7, completions=5, count=2)
    first = batch_mean_penalty(rewards[:2], groups[:2], mean=0.7, completions=5, count=2)
    second = batch_mean_penalty(rewards[2:], groups[2:] - 1, mean=0.7, completions=5, count=2)
    assert torch.cat([first, second]).tolist() == pytest.approx(whole.tolist())
