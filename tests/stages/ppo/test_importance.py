"""Another engine than the policy drew the tokens: what is measured, and how the loss is corrected."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from rlhf_cli.generation.torch_generator import TorchGenerator
from rlhf_cli.stages.ppo.forward_passes import RolloutTensors
from rlhf_cli.stages.ppo.importance import importance_correction


def tensors(logprobs, is_completion) -> RolloutTensors:
    values = torch.tensor(logprobs)
    return RolloutTensors(values, values, values, values, torch.tensor(is_completion))


def test_drift_is_measured_in_nats_per_token_of_the_sampler():
    before = tensors([[-1.0, -2.0], [-3.0, 7.0]], [[True, True], [True, False]])
    weights, found = importance_correction(before, [[-1.5, -2.0], [-2.0]], cap=1.25)
    assert found["generation/drift_kl"] == pytest.approx((-0.5 + 0.0 + 1.0) / 3)
    assert found["generation/drift_max"] == pytest.approx(1.0)
    expected = [[min(math.exp(0.5), 1.25), 1.0], [math.exp(-1.0), 1.0]]
    torch.testing.assert_close(weights, torch.tensor(expected))
    assert found["generation/importance_weight"] == pytest.approx((1.25 + 1.0 + math.exp(-1.0)) / 3)
    assert found["generation/truncated"] == pytest.approx(1 / 3)


def test_without_probabilities_of_the_sampler_nothing_is_weighted():
    before = tensors([[-1.0]], [[True]])
    assert importance_correction(before, None, cap=2.0) == (1.0, {})
    weights, found = importance_correction(before, [[-1.0]], cap=None)
    assert weights == 1.0
    assert found == {"generation/drift_kl": 0.0, "generation/drift_max": 0.0}


def test_a_large_drift_is_a_warning(capsys):
    before = tensors([[-1.0]], [[True]])
    importance_correction(before, [[-1.02]], cap=2.0)
    assert "warning" not in capsys.readouterr().err
    importance_correction(before, [[-0.9]], cap=2.0)
    assert "differ by 0.1 nats per token" in " ".join(capsys.readouterr().err.split())


class Drifting(TorchGenerator):
    """Says that tokens were drawn from other probabilities than the policy's by a factor of e^`by`."""

    by = 0.0

    def generate(self, policy, requests, **options):
        drawn = super().generate(policy, requests, **options)
        sums = policy.logprobs([request.prompt_ids for request in requests], drawn)
        return [
            dataclasses.replace(one, logprobs=[total / len(one.ids) + self.by] * len(one.ids))
            for one, total in zip(drawn, sums, strict=True)
        ]


def advantages_of_a_step(make_trainer, folder, work, monkeypatch, generator, **changes):
    trainer = make_trainer(folder, work, generator=generator, **changes)
    seen = []
    update = trainer.updater.update

    def seeing(step, experience, **options):
        seen.append(experience)
        return update(step, experience, **options)

    monkeypatch.setattr(trainer.updater, "update", seeing)
    metrics = trainer.step(0).metrics
    return seen[0], metrics


def test_the_importance_cap_bounds_the_weight_of_a_token(tiny_llama, tmp_path, monkeypatch, make_trainer):
    plain, metrics = advantages_of_a_step(make_trainer, tiny_llama, tmp_path / "0", monkeypatch, None)
    assert not [name for name in metrics if name.startswith("generation/")]
    drifting = Drifting()
    drifting.by = -3.0  # every token is about e^3 times as likely under the policy
    found = {}
    for cap in (2.0, 1.5, None):
        one, metrics = advantages_of_a_step(
            make_trainer, tiny_llama, tmp_path / f"{cap}", monkeypatch, drifting, importance_cap=cap
        )
        found[cap] = one.advantages
        assert metrics["generation/drift_kl"] == pytest.approx(-3.0, abs=1e-3)
        assert metrics["val/first_epoch_ratio"] == pytest.approx(1.0, abs=1e-5), "of the policy before and after"
        torch.testing.assert_close(one.returns, plain.returns)
    torch.testing.assert_close(found[None], plain.advantages)
    torch.testing.assert_close(found[2.0], 2.0 * plain.advantages)
    torch.testing.assert_close(found[1.5], 1.5 * plain.advantages)
