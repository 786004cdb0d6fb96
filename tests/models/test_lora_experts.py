"""LoRA on families whose layers are not all linear: fused experts, routers, kernels that read weights directly."""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from rlhf_cli.errors import ModelError
from rlhf_cli.models import lora as lora_module
from rlhf_cli.models.adapter_files import load_adapter, save_adapter
from rlhf_cli.models.adapter_layers import adapter_layers
from rlhf_cli.models.adapter_merging import merged_adapters
from rlhf_cli.models.lora import add_lora, merge_lora
from rlhf_cli.models.multi_adapter import MultiAdapterModel
from rlhf_cli.progress import say_once
from rlhf_cli.settings.shared import LoraSettings
from tests.conftest import byte_level_tokenizer
from tests.families.zoo import tiny_model

MIXTURES = ("mixtral", "deepseek_v3", "glm4_moe", "granitemoe", "gpt_oss", "llama4_text", "qwen3_next", "phimoe")
RENAMED_BY_PEFT = ("deepseek_v3", "glm4_moe", "qwen3_next")
"""Families whose shared experts PEFT takes for fused experts when it loads an adapter."""
IDS = torch.tensor([[5, 6, 7, 99, 33, 200, 12, 14]])
LORA = LoraSettings(rank=4, alpha=8.0)


def made(family: str) -> PreTrainedModel:
    return tiny_model(family, byte_level_tokenizer(pad=True))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def train(parameters: list[torch.nn.Parameter]) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.1)


@pytest.mark.parametrize("family", MIXTURES)
def test_an_adapter_on_experts_trains_saves_loads_and_merges(family, tmp_path):
    model = made(family)
    before = logits(model)
    parameters = add_lora(model, LORA)
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)
    experts = [key for key, layer in adapter_layers(model) if isinstance(layer, lora_module.ParamWrapper)]
    assert experts
    train(parameters)
    model(input_ids=IDS).logits.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters)
    trained = logits(model)
    assert (trained - before).abs().max() > 1e-2
    save_adapter(model, tmp_path)
    again = made(family)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), trained, atol=0, rtol=0)
    merge_lora(model)
    assert model.state_dict().keys() == made(family).state_dict().keys()
    torch.testing.assert_close(logits(model), trained, atol=1e-5, rtol=1e-4)
    if family not in RENAMED_BY_PEFT:
        torch.testing.assert_close(logits(PeftModel.from_pretrained(made(family), tmp_path)), trained)


def test_several_adapters_on_experts_are_kept_apart():
    model = made("mixtral")
    plain = logits(model)
    several = MultiAdapterModel(model)
    for name in ("policy", "critic"):
        several.add(name, LORA)
    train(several.parameters("critic"))
    with several.use_adapter("policy") as active:
        torch.testing.assert_close(logits(active), plain, atol=0, rtol=0)
    with several.use_adapter("critic") as active:
        assert (logits(active) - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits(model), plain, atol=0, rtol=0)


def test_experts_can_be_named_alone():
    model = made("qwen3_moe")
    add_lora(model, LoraSettings(rank=2, alpha=4.0, target_modules=["experts.down_proj"]))
    assert [layer.parameter_name for _, layer in adapter_layers(model)] == ["down_proj", "down_proj"]  # pyright: ignore


def covered(family: str, capsys: pytest.CaptureFixture[str], **settings) -> int | None:
    """The share in per cent that a line names; None without a line."""
    say_once.cache_clear()
    add_lora(made(family), LoraSettings(rank=4, alpha=8.0, **settings))
    found = re.search(r"the adapter covers (\d+)%", " ".join(capsys.readouterr().err.split()))
    return None if found is None else int(found[1])


def test_a_line_says_what_an_adapter_does_not_reach(capsys):
    for family in ("llama", "mixtral", "olmoe", "gpt_oss", "gemma3", "qwen3_5_moe"):
        assert covered(family, capsys) is None, family
    # Attention has 6,144 weights in two layers of Mixtral, experts 36,864 and routers 256.
    assert covered("mixtral", capsys, dropout=0.1) == 14
    assert covered("mamba", capsys) == 55


def test_experts_cannot_have_dropout():
    with pytest.raises(ModelError, match="cannot have dropout"):
        add_lora(made("mixtral"), LoraSettings(rank=2, alpha=4.0, dropout=0.1, target_modules=["down_proj"]))


def test_layers_that_a_kernel_reads_directly_get_no_adapter():
    model = made("falcon_h1")
    add_lora(model, LORA)
    adapted = {key.rpartition(".")[2] for key, _ in adapter_layers(model) if ".mamba." in key}
    assert adapted == {"in_proj"}


def test_an_adapter_that_is_not_where_it_was_asked_for_is_refused(monkeypatch):
    """As where PEFT renames targets: without our guard, it takes shared experts for fused ones."""
    monkeypatch.setattr(lora_module, "as_named", lambda base: nullcontext())
    with pytest.raises(ModelError, match="is not on the layers it was asked for: `layers"):
        add_lora(made("deepseek_v3"), LORA)


def test_the_vision_model_of_a_multimodal_one_gets_no_adapter():
    model = made("gemma3")
    add_lora(model, LORA)
    assert all(key.startswith("language_model.") for key, _ in adapter_layers(model))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_experts_are_merged_once_for_many_passes(family: str, monkeypatch):
    model = made(family)
    plain = logits(model)
    several = MultiAdapterModel(model)
    experts = LORA.model_copy(update={"target_modules": ["gate_up_proj", "down_proj"]})
    for name in ("policy", "critic"):
        several.add(name, experts)
        train(several.parameters(name))
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    made_whole: list[object] = []
    factors = lora_module.ParamWrapper.get_delta_factors

    def counting(layer, name):
        made_whole.append(layer)
        return factors(layer, name)

    monkeypatch.setattr(lora_module.ParamWrapper, "get_delta_factors", counting)
    with several.use_adapter("policy"):
        before = logits(model)
        count = len(made_whole)
        with merged_adapters(model):
            assert all(torch.equal(logits(model), before) for _ in range(3))
        assert len(made_whole) == 2 * count > 0, "once for all passes"
        with pytest.raises(RuntimeError, match="within"), merged_adapters(model):
            raise RuntimeError("within")
        assert torch.equal(logits(model), before)
        with torch.no_grad():
            several.parameters("policy")[-1].add_(0.3)
        with merged_adapters(model):
            changed = logits(model)
        assert not torch.equal(changed, before), "the adapter has other weights"
        assert torch.equal(changed, logits(model))
    with merged_adapters(model):
        assert torch.equal(logits(model), plain), "no adapter is active"
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], weight) for name, weight in weights.items() if "lora" not in name)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_cost_of_experts_is_said_with_a_way_out(family: str, capsys):
    say_once.cache_clear()
    add_lora(made(family), LORA)
    line = " ".join(capsys.readouterr().err.split())
    found = re.search(
        r"changes fused experts \([\d,]+ weights\).*`lora.target_modules: \[(.*?)\]` leaves them out", line
    )
    assert found is not None, line
    model = made(family)
    add_lora(model, LoraSettings(rank=4, alpha=8.0, target_modules=found[1].split(", ")))
    layers = [layer for _, layer in adapter_layers(model)]
    assert layers
    assert not any(isinstance(layer, lora_module.ParamWrapper) for layer in layers)
    assert "fused experts (" not in capsys.readouterr().err
