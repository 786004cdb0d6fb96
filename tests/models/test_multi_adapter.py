"""Several adapters on one frozen model: which one is active, and which ones train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.multi_adapter import MultiAdapterModel
from rlhf_cli.settings.shared import LoraSettings

IDS = torch.arange(5, 11).unsqueeze(0)


@pytest.fixture
def model(tiny_llama: Path) -> MultiAdapterModel:
    shared = MultiAdapterModel(load_policy(ModelSource(str(tiny_llama))))
    torch.manual_seed(0)
    for name in ("first", "second"):
        shared.add(name, LoraSettings(rank=2, alpha=4.0))
        with torch.no_grad():
            for parameter in shared.parameters(name):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return shared


@torch.no_grad()
def logits(model: MultiAdapterModel) -> torch.Tensor:
    return model.model(input_ids=IDS).logits


def test_a_context_uses_its_adapter_and_then_restores_the_previous_one(model: MultiAdapterModel, tiny_llama: Path):
    plain = logits(model)
    assert torch.equal(plain, load_policy(ModelSource(str(tiny_llama)))(input_ids=IDS).logits)
    with model.use_adapter("first"):
        first = logits(model)
        with model.use_adapter("second"):
            assert not torch.allclose(logits(model), first)
        assert torch.equal(logits(model), first)
        with model.use_adapter(None):
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), first)
    assert torch.equal(logits(model), plain)
    assert not torch.allclose(first, plain)


def test_every_trained_adapter_stays_trainable_whichever_is_active(model: MultiAdapterModel):
    for active in ("first", None, "second"):
        with model.use_adapter(active):
            assert all(weight.requires_grad for name in ("first", "second") for weight in model.parameters(name))
