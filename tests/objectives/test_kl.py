"""Which KL penalty has the gradient of the KL: exact expectations over all sequences, no sampling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_cli.objectives.advantages import generalized_advantages, token_rewards
from rlhf_cli.objectives.kl import kl_per_token

DISTANCES = [0.1, 0.5, 1.5]


def pair(size: int, distance: float, seed: int) -> tuple[Tensor, Tensor]:
    """Logits of a policy over `size` tokens, and log-probabilities of its reference."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(size, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)
    noise = torch.randn(size, generator=generator, dtype=torch.float64)
    return (reference + distance * noise).requires_grad_(), reference


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits)[0]


def of_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    policy = logits.log_softmax(-1)
    return gradient((policy.exp() * (policy - reference)).sum(), logits)


def of_loss(logits: Tensor, reference: Tensor, estimator) -> Tensor:
    """`kl_in: loss`: the estimate is differentiated, the sampled tokens are constants."""
    policy = logits.log_softmax(-1)
    return gradient((policy.detach().exp() * kl_per_token(policy[None], reference[None], estimator)[0]).sum(), logits)


def of_reward(logits: Tensor, reference: Tensor, estimator) -> Tensor:
    """`kl_in: reward`: the estimate is a constant that weighs grad log pi, as every reward does."""
    policy = logits.log_softmax(-1)
    estimate = kl_per_token(policy[None].detach(), reference[None], estimator)[0]
    return gradient((policy.detach().exp() * estimate * policy).sum(), logits)


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one, other, dim=0))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("size", [2, 5, 50, 300])
def test_k1_in_the_reward_and_k2_in_the_loss_have_the_gradient_of_the_divergence(size, distance):
    for seed in range(10):
        logits, reference = pair(size, distance, seed)
        exact = of_divergence(logits, reference)
        torch.testing.assert_close(of_reward(logits, reference, "k1"), exact, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(of_loss(logits, reference, "k2"), exact, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(of_loss(logits, reference, "k1"), torch.zeros_like(exact), atol=1e-12, rtol=0)


def test_k3_in_the_loss_approaches_the_gradient_of_the_divergence():
    pairs = [pair(50, distance, 0) for distance in DISTANCES]
    found = [cosine(of_loss(*one, "k3"), of_divergence(*one)) for one in pairs]
    assert found[0] > 0.99
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_in_the_reward_have_another_gradient(estimator, distance):
    """Why the settings refuse them: both also punish a token that the policy made rarer, and make it rarer still."""
    pairs = [pair(50, distance, seed) for seed in range(100)]
    cosines = [cosine(of_reward(*one, estimator), of_divergence(*one)) for one in pairs]
    assert min(cosines) < -0.8  # for some pairs it increases the KL
    if distance == DISTANCES[0]:
        assert abs(sum(cosines)) / len(cosines) < 0.2
    rarer = torch.tensor([[-1.0]])
    assert float(kl_per_token(rarer, torch.zeros(1, 1), estimator)) > 0 > float(kl_per_token(rarer, torch.zeros(1, 1)))


@pytest.mark.parametrize("size", [2, 4])
def test_over_several_tokens_a_reward_sees_later_tokens_and_a_loss_does_not(size):
    """All sequences of two tokens. In the reward, a token also answers for the KL of the token after it: the gradient
    is that of the KL of sequences. In the loss, it is that of each token's KL, the tokens before it given."""
    first, reference = pair(size, 0.7, 1)
    rows = [pair(size, 0.7, 2 + token) for token in range(size)]
    second = torch.stack([logits for logits, _ in rows]).detach().requires_grad_()
    references = torch.stack([one for _, one in rows])
    tokens = torch.cartesian_prod(torch.arange(size), torch.arange(size))

    def logprobs_of(start: Tensor, following: Tensor) -> Tensor:
        return torch.stack([start[tokens[:, 0]], following[tokens[:, 0], tokens[:, 1]]], dim=1)

    policy = logprobs_of(first.log_softmax(-1), second.log_softmax(-1))
    of_reference = logprobs_of(reference, references)
    share = policy.detach().sum(dim=1).exp()
    exact = gradient((policy.sum(dim=1).exp() * (policy - of_reference).sum(dim=1)).sum(), first)

    is_real = torch.ones_like(tokens, dtype=torch.bool)
    zeros = torch.zeros_like(policy)
    estimate = kl_per_token(policy.detach(), of_reference)
    rewards = token_rewards(zeros[:, 0].detach(), estimate, is_real, kl_coef=1.0)
    returns, _ = generalized_advantages(rewards, zeros.detach(), is_real, gamma=1.0, gae_lambda=1.0)
    policy = logprobs_of(first.log_softmax(-1), second.log_softmax(-1))
    in_reward = gradient((share.unsqueeze(1) * -returns * policy).sum(), first)
    torch.testing.assert_close(in_reward, exact, atol=1e-10, rtol=1e-8)

    policy = logprobs_of(first.log_softmax(-1), second.log_softmax(-1))
    in_loss = gradient((share.unsqueeze(1) * kl_per_token(policy, of_reference, "k2")).sum(), first)
    torch.testing.assert_close(in_loss, of_divergence(first, reference), atol=1e-10, rtol=1e-8)
    assert not torch.allclose(in_loss, exact, atol=1e-3)
