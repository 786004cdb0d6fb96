"""PPO's losses against hand-computed values (Schulman et al. 2017, eq. 7; OpenAI baselines' value loss)."""

import math

import pytest
import torch

from rlhf_cli.objectives.policy import policy_loss, truncated_importance_weights, value_loss

ONE = torch.ones(1, 1, dtype=torch.bool)


def surrogate(ratio: float, advantage: float) -> float:
    old = torch.tensor([[-1.5]])
    loss = policy_loss(old + math.log(ratio), old, torch.tensor([[advantage]]), ONE, clip_range=0.2)
    return float(loss.loss)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        pytest.param(2.0, +1.0, -1.2, id="good action, already likelier: clipped"),
        pytest.param(0.5, +1.0, -0.5, id="good action, less likely: not clipped"),
        pytest.param(0.5, -1.0, +0.8, id="bad action, already less likely: clipped"),
        pytest.param(2.0, -1.0, +2.0, id="bad action, likelier: not clipped"),
        pytest.param(1.0, +3.0, -3.0, id="no change: minus the advantage"),
    ],
)
def test_policy_loss_is_equation_7(ratio, advantage, expected):
    assert surrogate(ratio, advantage) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        pytest.param(2.0, +1.0, 0.0, id="clipped: no gradient"),
        pytest.param(0.5, +1.0, -0.5, id="not clipped: -A ratio"),
        pytest.param(2.0, -1.0, +2.0, id="not clipped, bad action"),
    ],
)
def test_gradient_stops_where_the_surrogate_is_clipped(ratio, advantage, expected):
    old = torch.tensor([[-1.5]])
    logprobs = (old + math.log(ratio)).requires_grad_()
    policy_loss(logprobs, old, torch.tensor([[advantage]]), ONE, clip_range=0.2).loss.backward()
    assert float(logprobs.grad) == pytest.approx(expected, abs=1e-6)


def test_sums_and_metrics_over_a_ragged_batch():
    is_completion = torch.tensor([[True, True], [True, False]])
    old = torch.zeros(2, 2)
    logprobs = torch.log(torch.tensor([[1.0, 1.5], [0.7, 99.0]]))
    advantages = torch.tensor([[1.0, 2.0], [-1.0, 50.0]])
    result = policy_loss(logprobs, old, advantages, is_completion, clip_range=0.2)
    assert float(result.loss) == pytest.approx(-(1.0 + 2.4 - 0.8), abs=1e-6)
    assert int(result.clipped) == 2
    assert float(result.ratio) == pytest.approx(3.2, abs=1e-6)
    assert float(result.squared_ratio) == pytest.approx(1 + 2.25 + 0.49, abs=1e-6)
    assert float(result.approx_kl) == pytest.approx((math.log(1.5) ** 2 + math.log(0.7) ** 2) / 2, abs=1e-6)
    assert result.largest_log_ratio.tolist() == pytest.approx([math.log(1.5), -math.log(0.7)], abs=1e-6)


def test_padding_filled_with_nan_changes_neither_loss_nor_gradient():
    is_completion = torch.tensor([[True, False]])
    results = []
    for filler in (0.0, math.nan, math.inf):
        logprobs = torch.tensor([[0.1, filler]], requires_grad=True)
        values = torch.tensor([[0.3, filler]], requires_grad=True)
        padded = torch.tensor([[0.2, filler]])
        loss = policy_loss(logprobs, padded, padded, is_completion, clip_range=0.2).loss
        loss = loss + value_loss(values, padded, padded + 1, is_completion, clip_range=0.2).loss
        loss.backward()
        results.append((float(loss.detach()), logprobs.grad.tolist(), values.grad.tolist()))
    assert results[0] == results[1] == results[2]
    assert all(math.isfinite(x) for x in [results[0][0], *results[0][1][0], *results[0][2][0]])


@pytest.mark.parametrize(
    ("value", "expected", "clipped"),
    [
        pytest.param(0.1, 0.5 * 0.9**2, 0, id="moved little: plain squared error"),
        pytest.param(0.8, 0.5 * 0.8**2, 1, id="ran ahead to the return: judged at old + clip"),
        pytest.param(-0.7, 0.5 * 1.7**2, 0, id="ran away from it: the larger, unclipped error"),
        pytest.param(1.9, 0.5 * 0.9**2, 0, id="ran past the return: the larger error counts"),
    ],
)
def test_value_loss_takes_the_larger_of_clipped_and_plain_error(value, expected, clipped):
    result = value_loss(torch.tensor([[value]]), torch.zeros(1, 1), torch.ones(1, 1), ONE, clip_range=0.2)
    assert float(result.loss) == pytest.approx(expected, abs=1e-6)
    assert int(result.clipped) == clipped


def test_value_loss_clips_downwards_too_and_not_at_all_without_a_range():
    """V = -0.8 ran down to the return -1: judged at -0.2, so (-0.2 + 1)^2 / 2."""
    value, old, returns = torch.tensor([[-0.8]]), torch.zeros(1, 1), -torch.ones(1, 1)
    clipped = value_loss(value, old, returns, ONE, clip_range=0.2)
    assert float(clipped.loss) == pytest.approx(0.5 * 0.8**2, abs=1e-6)
    assert int(clipped.clipped) == 1
    plain = value_loss(value, old, returns, ONE, clip_range=None)
    assert float(plain.loss) == pytest.approx(0.5 * 0.2**2, abs=1e-6)
    assert int(plain.clipped) == 0


def test_weights_are_ratios_up_to_the_cap():
    """min(pi / mu, 2): 0.5 / 0.4, 0.1 / 0.4, 0.9 / 0.1 cut, padding 1."""
    pi = torch.tensor([[0.5, 0.1], [0.9, math.nan]], dtype=torch.float64).log()
    mu = torch.tensor([[0.4, 0.4], [0.1, math.nan]], dtype=torch.float64).log()
    real = torch.tensor([[True, True], [True, False]])
    weights = truncated_importance_weights(pi.requires_grad_(), mu, real, cap=2.0)
    expected = torch.tensor([[1.25, 0.25], [2.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, atol=1e-12, rtol=0)
    assert not weights.requires_grad


def test_the_mean_of_untruncated_weights_over_the_sampler_is_one():
    pi = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    mu = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    real = torch.ones(1, 3, dtype=torch.bool)
    weights = truncated_importance_weights(pi.log()[None], mu.log()[None], real, cap=10.0)
    assert float((mu * weights[0]).sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("log_ratio", [-0.7, 0.0, 0.1, 0.7])
def test_weighting_the_advantage_is_weighting_the_loss(advantage, log_ratio):
    real, weight = torch.ones(1, 1, dtype=torch.bool), 0.3
    now = torch.tensor([[log_ratio - 2.0]], dtype=torch.float64)
    old = torch.tensor([[-2.0]], dtype=torch.float64)
    of = torch.tensor([[advantage]], dtype=torch.float64)
    plain = policy_loss(now, old, of, real, clip_range=0.2)
    weighted = policy_loss(now, old, of * weight, real, clip_range=0.2)
    assert float(weighted.loss) == pytest.approx(weight * float(plain.loss), abs=1e-12)
    assert weighted.clipped == plain.clipped
