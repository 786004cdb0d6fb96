"""Sampling with an adapter: merged in float32, lean in bfloat16, and every weight as it was afterwards."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from rlhf_cli.models.adapter_merging import merged_adapters
from rlhf_cli.models.multi_adapter import MultiAdapterModel
from rlhf_cli.settings.shared import LoraSettings
from tests.conftest import byte_level_tokenizer
from tests.families.zoo import tiny_model

LORA = LoraSettings(rank=4, alpha=12.0)
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32) -> MultiAdapterModel:
    model = MultiAdapterModel(tiny_model(family, byte_level_tokenizer(pad=True)).eval().to(dtype))
    for seed, name in enumerate(("policy", "critic")):
        model.add(name, LORA)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for factor in model.parameters(name):
                factor.add_(0.05 * torch.randn(factor.shape, generator=generator))
    return model


@torch.no_grad()
def hidden(model: MultiAdapterModel) -> Tensor:
    return model.model(IDS).logits.float()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_float32_the_adapter_is_part_of_the_weights_and_gone_afterwards(family):
    several = adapted(family)
    before = {name: (weight, weight.clone()) for name, weight in several.model.state_dict().items()}
    plain = hidden(several)
    with several.use_adapter("policy") as model:
        expected = hidden(several)
        assert not torch.allclose(expected, plain, atol=1e-2)
        with merged_adapters(model):
            changed = [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name][1])]
            assert changed
            assert all(name.endswith("base_layer.weight") for name in changed)
            torch.testing.assert_close(hidden(several), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(hidden(several), expected), "bit for bit"
    after = several.model.state_dict()
    assert all(torch.equal(after[name], copy) for name, (_, copy) in before.items())
    assert all(after[name].data_ptr() == weight.data_ptr() for name, (weight, _) in before.items()), "no copy remains"


def test_an_error_inside_restores_the_weights():
    several = adapted()
    with several.use_adapter("policy") as model:
        expected = hidden(several)
        with pytest.raises(RuntimeError, match="inside"), merged_adapters(model):
            raise RuntimeError("inside")
        assert torch.equal(hidden(several), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_nothing_is_merged_and_the_products_stay_apart(dtype):
    """A merged weight would be rounded to bfloat16, and a small update lost (trap of docs/decisions/0010)."""
    several = adapted(dtype=dtype)
    weights = {name: weight.clone() for name, weight in several.model.state_dict().items()}
    with several.use_adapter("policy") as model, torch.autocast("cpu", torch.bfloat16):
        expected = hidden(several)
        with merged_adapters(model):
            assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
            torch.testing.assert_close(hidden(several), expected, atol=2e-2, rtol=2e-2)
            assert any("forward" in vars(layer) for layer in model.modules())
        assert not any("forward" in vars(layer) for layer in model.modules())
        assert torch.equal(hidden(several), expected)


def test_without_autocast_an_adapter_on_bfloat16_weights_stays_as_peft_computes_it():
    several = adapted(dtype=torch.bfloat16)
    with several.use_adapter("policy") as model:
        expected = hidden(several)
        with merged_adapters(model):
            assert torch.equal(hidden(several), expected)


@pytest.mark.parametrize("context", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_an_adapter_that_is_not_active_is_not_used(context):
    several = adapted()
    with context():
        plain = hidden(several)
        with merged_adapters(several.model):
            assert torch.equal(hidden(several), plain)
        with several.use_adapter("critic") as model:
            expected = hidden(several)
            with merged_adapters(model):
                torch.testing.assert_close(hidden(several), expected, atol=2e-2, rtol=2e-2)


def test_a_model_without_adapters_is_left_alone():
    model = tiny_model("llama", byte_level_tokenizer(pad=True)).eval()
    with torch.no_grad():
        expected = model(IDS).logits
        with merged_adapters(model):
            assert torch.equal(model(IDS).logits, expected)
