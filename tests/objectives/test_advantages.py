"""GAE, token rewards, KL and whitening against hand-computed values and against the definition written as a sum."""

import math

import pytest
import torch

from rlhf_cli.objectives.advantages import generalized_advantages, token_rewards
from rlhf_cli.objectives.kl import adapted_kl_coef, kl_per_token
from rlhf_cli.objectives.masking import masked_mean, masked_variance, whiten

RAGGED = torch.tensor([[True, True, True], [True, False, False]])


def test_score_lands_on_the_last_real_token():
    kl = torch.tensor([[0.1, 0.2, 0.3], [1.0, math.nan, math.nan]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), kl, RAGGED, kl_coef=0.5)
    assert rewards.tolist() == [pytest.approx([-0.05, -0.1, 1.85]), pytest.approx([-1.5, 0.0, 0.0])]


def test_token_rewards_sum_to_the_penalized_objective():
    torch.manual_seed(0)
    kl, scores = torch.randn(2, 3), torch.randn(2)
    rewards = token_rewards(scores, kl, RAGGED, kl_coef=0.3)
    expected = scores - 0.3 * kl.masked_fill(~RAGGED, 0).sum(dim=1)
    torch.testing.assert_close(rewards.sum(dim=1), expected)


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
    everything = torch.ones(1, 2, dtype=torch.bool)
    advantages, returns = generalized_advantages(rewards, values, everything, gamma=0.9, gae_lambda=0.8)
    last = 1.0 - 0.25
    first = (0.0 + 0.9 * 0.25 - 0.5) + 0.9 * 0.8 * last
    assert advantages.tolist() == [pytest.approx([first, last])]
    assert returns.tolist() == [pytest.approx([first + 0.5, last + 0.25])]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.0), (0.97, 1.0)])
def test_gae_is_the_discounted_sum_of_deltas(gamma, gae_lambda):
    torch.manual_seed(1)
    rewards, values = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    advantages, _ = generalized_advantages(rewards, values, RAGGED, gamma=gamma, gae_lambda=gae_lambda)
    for row, length in enumerate((3, 1)):
        v = [*values[row, :length].tolist(), 0.0]
        delta = [float(rewards[row, t]) + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * gae_lambda) ** (k - t) * delta[k] for k in range(t, length))
            assert float(advantages[row, t]) == pytest.approx(expected)
        assert advantages[row, length:].abs().sum() == 0


def test_lambda_1_gives_return_minus_value():
    torch.manual_seed(2)
    rewards, values = torch.randn(1, 3), torch.randn(1, 3)
    everything = torch.ones(1, 3, dtype=torch.bool)
    _, returns = generalized_advantages(rewards, values, everything, gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1))


def test_gae_ignores_nan_on_padding():
    rewards = torch.tensor([[1.0, math.nan, math.nan]])
    values = torch.tensor([[0.5, math.nan, math.nan]])
    advantages, returns = generalized_advantages(rewards, values, RAGGED[1:], gamma=1.0, gae_lambda=0.95)
    assert advantages.tolist() == [[0.5, 0.0, 0.0]]
    assert returns.tolist() == [[1.0, 0.0, 0.0]]


def test_kl_estimators_by_hand_and_in_expectation():
    x = torch.tensor([[0.5, -0.5]])
    assert kl_per_token(x, torch.zeros(1, 2), "k1").tolist() == [[0.5, -0.5]]
    assert kl_per_token(x, torch.zeros(1, 2), "k2").tolist() == [[0.125, 0.125]]
    expected = [math.exp(-0.5) - 1 + 0.5, math.exp(0.5) - 1 - 0.5]
    assert kl_per_token(x, torch.zeros(1, 2), "k3").tolist() == [pytest.approx(expected, abs=1e-6)]
    # Over the policy's own distribution both estimators average to the exact divergence.
    policy, reference = torch.randn(5).log_softmax(0), torch.randn(5).log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        average = (policy.exp() * kl_per_token(policy[None], reference[None], estimator)[0]).sum()
        torch.testing.assert_close(average, exact)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.15),
        (6.6, 0.15 * (1 + 0.1 * 0.0512)),
        (60.0, 0.15 * (1 + 0.2 * 0.0512)),
        (0.0, 0.15 * (1 - 0.2 * 0.0512)),
    ],
)
def test_adaptive_kl_coefficient(kl, expected):
    assert adapted_kl_coef(0.15, kl, target=6.0, horizon=10_000, episodes=512) == pytest.approx(expected, rel=1e-9)


def test_whitening_over_real_tokens_only():
    values = torch.tensor([[1.0, 2.0, 6.0], [3.0, math.nan, math.nan]])
    whitened = whiten(values, RAGGED)
    assert float(masked_mean(whitened, RAGGED)) == pytest.approx(0.0, abs=1e-6)
    assert float(masked_variance(whitened, RAGGED)) == pytest.approx(1.0, abs=1e-5)
    assert whitened[1, 1:].tolist() == [0.0, 0.0]
    # By hand: mean 3, population variance (4 + 1 + 9 + 0) / 4.
    assert float(whitened[0, 0]) == pytest.approx(-2 / math.sqrt(3.5), abs=1e-6)


def test_whitening_rewards_keeps_their_mean():
    values = torch.tensor([[1.0, 2.0, 6.0], [3.0, 0.0, 0.0]])
    whitened = whiten(values, RAGGED, keep_mean=True)
    assert float(masked_mean(whitened, RAGGED)) == pytest.approx(3.0, abs=1e-5)
    assert float(masked_variance(whitened, RAGGED)) == pytest.approx(1.0, abs=1e-5)
