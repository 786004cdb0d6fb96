"""The weights that are handed to another engine: names and values of the checkpoint, adapters merged."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.lora import add_lora, merge_lora
from rlhf_cli.models.low_rank import separate
from rlhf_cli.models.merged_weights import merged_weights
from rlhf_cli.models.multi_adapter import MultiAdapterModel
from rlhf_cli.settings.shared import LoraSettings
from tests.conftest import byte_level_tokenizer
from tests.families.zoo import tiny_model

LORA = LoraSettings(rank=4, alpha=8.0)


def randomize(parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.1, generator=generator)


def stored(model, folder) -> dict[str, torch.Tensor]:
    """What transformers itself writes."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_names_and_values_are_those_of_the_merged_model_s_checkpoint(family, tmp_path):
    model = tiny_model(family, byte_level_tokenizer(pad=True))
    untouched = {name: weight.clone() for name, weight in model.state_dict().items()}
    randomize(add_lora(model, LORA), 1)
    found = dict(merged_weights(model))
    merge_lora(model)
    expected = stored(model, tmp_path)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0, msg=name)
    changed = [name for name, weight in model.state_dict().items() if not torch.equal(weight, untouched[name])]
    assert len(changed) >= 4, "the adapter changes something"


def test_the_active_adapter_alone_is_merged_and_the_model_stays_as_it_is(tiny_llama):
    plain = dict(merged_weights(load_policy(ModelSource(str(tiny_llama)))))
    several = MultiAdapterModel(load_policy(ModelSource(str(tiny_llama))))
    for seed, name in enumerate(("policy", "critic")):
        several.add(name, LORA)
        randomize(several.parameters(name), seed)
    ids = torch.tensor([[5, 6, 7, 8]])
    names = ["policy", None, "critic", "policy"]
    logits, found = [], []
    for name in names:
        with several.use_adapter(name) as model, torch.no_grad():
            found.append(dict(merged_weights(model)))
            logits.append(model(input_ids=ids).logits)
    assert all(weights.keys() == plain.keys() for weights in found)
    for name, value in plain.items():
        torch.testing.assert_close(found[1][name], value, atol=0, rtol=0)
        torch.testing.assert_close(found[0][name], found[3][name], atol=0, rtol=0)
    torch.testing.assert_close(logits[0], logits[3], atol=0, rtol=0)
    alone = load_policy(ModelSource(str(tiny_llama)))
    alone.load_state_dict(found[2], strict=False)  # its head is tied
    with torch.no_grad():
        torch.testing.assert_close(alone(input_ids=ids).logits, logits[2], atol=1e-5, rtol=1e-4)


def test_an_update_that_is_kept_apart_is_added(tiny_llama):
    model = load_policy(ModelSource(str(tiny_llama)))
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.weight.detach().clone()
    a, b = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
    separate(layer, a, b)
    found = dict(merged_weights(model))["model.layers.0.self_attn.q_proj.weight"]
    assert (layer.weight - before).abs().max() > 0.1
    torch.testing.assert_close(found, before, atol=1e-5, rtol=0)


def test_tied_weights_come_once(tmp_path):
    model = tiny_model("llama", byte_level_tokenizer(pad=True))
    names = [name for name, _ in merged_weights(model)]
    model.lm_head.weight = model.model.embed_tokens.weight
    assert isinstance(model.lm_head, nn.Linear)
    assert [name for name, _ in merged_weights(model)] == [name for name in names if name != "lm_head.weight"]
