"""LoRA on the backbone: exact merging, one set of keys for every head, nothing outside the backbone adapted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from rlhf_cli.errors import ModelError
from rlhf_cli.models.adapter_files import load_adapter, save_adapter
from rlhf_cli.models.adapter_layers import adapter_layers, adapter_state, backbone, load_adapter_state
from rlhf_cli.models.lora import add_lora, merge_lora
from rlhf_cli.settings.shared import LoraSettings

_SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(params=["llama", "gpt2", "t5", "qwen2", "qwen3", "neox", "bart", "bert"])
def model(request: pytest.FixtureRequest, tiny_llama: Path, tiny_gpt2: Path, tiny_t5: Path, tiny_bert: Path):
    torch.manual_seed(5)
    makers = {
        "llama": lambda: LlamaForCausalLM.from_pretrained(tiny_llama),
        "gpt2": lambda: GPT2LMHeadModel.from_pretrained(tiny_gpt2),
        "t5": lambda: T5ForConditionalGeneration.from_pretrained(tiny_t5),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SMALL, num_key_value_heads=2)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SMALL, num_key_value_heads=2, head_dim=8)),
        "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SMALL)),
        "bart": lambda: BartForConditionalGeneration(
            BartConfig(vocab_size=320, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
                       decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4)
        ),
        "bert": lambda: AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=1),
    }  # fmt: skip
    return makers[request.param]().eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(5, 17).reshape(2, 6)
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def randomize(model: PreTrainedModel, name: str = "default") -> None:
    torch.manual_seed(9)
    for weight in adapter_state(model, name).values():
        weight.normal_(std=0.2)


def test_merged_weights_give_the_adapters_logits(model: PreTrainedModel):
    plain = logits(model)
    names = [name for name, _ in model.named_modules()]
    add_lora(model, LoraSettings(rank=4, alpha=8.0))
    assert torch.equal(logits(model), plain)  # B = 0
    randomize(model)
    adapted = logits(model)
    assert (adapted - plain).abs().max() > 1e-3
    merge_lora(model)
    assert torch.allclose(logits(model), adapted, atol=1e-5, rtol=1e-5)
    assert [name for name, _ in model.named_modules()] == names
    assert not hasattr(backbone(model), "peft_config")


def test_only_the_adapter_trains_and_heads_are_left_alone(model: PreTrainedModel):
    parameters = add_lora(model, LoraSettings(rank=4, alpha=8.0))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any(part in name for name in trained for part in ("lm_head", "embed_out", "pooler", "classifier"))
    assert len(trained) == len(parameters)
    # Every linear layer of the attention and feed-forward blocks is adapted, not some of them.
    output = model.get_output_embeddings()
    base = backbone(model)
    plain = [name for name, module in base.named_modules()
             if isinstance(module, nn.Linear | Conv1D) and module is not output
             and "lora_" not in name and not name.endswith("base_layer") and "pooler" not in name]  # fmt: skip
    assert plain == []


def test_nothing_is_warned_about(model: PreTrainedModel, recwarn: pytest.WarningsRecorder):
    add_lora(model, LoraSettings(rank=4, alpha=8.0))
    add_lora(model, LoraSettings(rank=4, alpha=8.0), name="second")
    assert [str(warning.message) for warning in recwarn] == []


def test_rank_and_alpha_scale_the_update(tiny_llama: Path):
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    add_lora(model, LoraSettings(rank=4, alpha=6.0, target_modules=["q_proj"]))
    randomize(model)
    before = model.model.layers[1].self_attn.q_proj.get_base_layer().weight.detach().clone()
    a, b = (adapter_state(model)[f"layers.1.self_attn.q_proj.lora_{half}.weight"] for half in "AB")
    merge_lora(model)
    torch.testing.assert_close(model.model.layers[1].self_attn.q_proj.weight.data, before + 1.5 * b @ a)


def test_merging_rounds_once(tiny_llama: Path):
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    add_lora(model, LoraSettings(rank=4, alpha=8.0))
    assert all(weight.dtype == torch.float32 for weight in adapter_state(model).values())
    randomize(model)
    layer = dict(adapter_layers(model))["layers.0.mlp.up_proj"]
    exact = layer.get_base_layer().weight.float() + layer.get_delta_weight("default")
    merge_lora(model, dtype=torch.bfloat16)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, exact.bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_one_adapter_fits_every_head(tiny_llama: Path, tmp_path: Path):
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    add_lora(classifier, LoraSettings(rank=4, alpha=8.0), name="reward")
    randomize(classifier, "reward")
    save_adapter(classifier, tmp_path, "reward")
    assert not list(tmp_path.glob("*.bin"))
    bare = AutoModel.from_pretrained(tiny_llama)
    causal = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for model in (bare, causal):
        load_adapter(model, tmp_path, "reward")
        assert adapter_state(model, "reward").keys() == adapter_state(classifier, "reward").keys()
        assert "layers.0.self_attn.q_proj.lora_A.weight" in adapter_state(model, "reward")
        for key, weight in adapter_state(model, "reward").items():
            assert torch.equal(weight, adapter_state(classifier, "reward")[key])


def test_peft_itself_reads_what_is_saved(model: PreTrainedModel, tmp_path: Path):
    import copy

    untouched = copy.deepcopy(model)
    add_lora(model, LoraSettings(rank=4, alpha=8.0))
    randomize(model)
    save_adapter(model, tmp_path)
    read = PeftModel.from_pretrained(untouched, tmp_path).eval()
    torch.testing.assert_close(logits(read), logits(model))


def test_adapters_side_by_side_do_not_touch_each_other(tiny_llama: Path):
    model = LlamaForCausalLM.from_pretrained(tiny_llama).eval()
    plain = logits(model)
    add_lora(model, LoraSettings(rank=4, alpha=8.0), name="policy")
    randomize(model, "policy")
    first = {key: weight.clone() for key, weight in adapter_state(model, "policy").items()}
    policy = logits(model)
    add_lora(model, LoraSettings(rank=2, alpha=8.0), name="value")
    assert torch.equal(logits(model), plain)  # the new one is active, and it is still nothing
    assert all(torch.equal(first[key], weight) for key, weight in adapter_state(model, "policy").items())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-2] for name in trained} == {"policy", "value"}
    merge_lora(model, "policy")
    torch.testing.assert_close(logits(model), policy, atol=1e-5, rtol=1e-5)


def test_state_that_does_not_fit_is_refused(tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path):
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    add_lora(model, LoraSettings(rank=4, alpha=8.0))
    state = dict(adapter_state(model))
    missing = dict(list(state.items())[1:])
    with pytest.raises(ModelError, match=r"`layers\.0\.self_attn\.q_proj\.lora_A\.weight` is missing"):
        load_adapter_state(model, missing)
    with pytest.raises(ModelError, match=r"must have shape \(4, 32\), got \(3, 32\)"):
        load_adapter_state(model, state | {next(iter(state)): torch.zeros(3, 32)})
    save_adapter(model, tmp_path)
    with pytest.raises(ModelError, match="the model has no layer for"):
        load_adapter(GPT2LMHeadModel.from_pretrained(tiny_gpt2), tmp_path)
    with pytest.raises(ModelError, match="cannot load an adapter"):
        load_adapter(model, tmp_path / "nowhere")


def test_unknown_layer_names_are_refused_with_the_known_ones(tiny_llama: Path):
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(ModelError, match="no linear layer `c_attn`") as caught:
        add_lora(model, LoraSettings(rank=4, alpha=8.0, target_modules=["q_proj", "c_attn"]))
    assert "q_proj" in (caught.value.hint or "")
    with pytest.raises(ModelError, match="no linear layer `proj`"):  # a tail of a name is not a name
        add_lora(model, LoraSettings(rank=4, alpha=8.0, target_modules="proj"))
    add_lora(model, LoraSettings(rank=4, alpha=8.0, target_modules=["self_attn.q_proj", "v_proj"]))
    assert {key.rsplit(".", 1)[-1] for key, _ in adapter_layers(model)} == {"q_proj", "v_proj"}


def test_merging_what_is_not_there_is_refused(tiny_llama: Path):
    with pytest.raises(ModelError, match="no adapter `default`"):
        merge_lora(LlamaForCausalLM.from_pretrained(tiny_llama))
