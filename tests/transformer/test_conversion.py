"""GPT-2 and Llama checkpoints as explicit transformers and back: same weights, same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from rlhf_cli.cli.export import export
from rlhf_cli.cli.transformer import convert
from rlhf_cli.errors import ModelError, UsageError
from rlhf_cli.models.build import build_model
from rlhf_cli.models.loading import ModelSource, load_policy, load_tokenizer
from rlhf_cli.settings.shared import BuildSettings
from rlhf_cli.transformer import TransformerConfig, TransformerForCausalLM
from rlhf_cli.transformer import conversion as checkpoints
from rlhf_cli.transformer.conversion import as_explicit, as_transformers
from rlhf_cli.transformer.conversion_configs import explicit_config

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def gpt2_config(**changes: Any) -> GPT2Config:
    sizes = {"vocab_size": 90, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2Config(**(sizes | {"bos_token_id": 0, "eos_token_id": 0} | changes))


def llama_config(**changes: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": 90,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    return LlamaConfig(**(sizes | changes))


def drawn(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """Every weight at random, biases and norms too, and large enough that logits differ."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = kind(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


GPT2S = {
    "gpt2": {},
    "gpt2, exact gelu, narrow": {"activation_function": "gelu", "n_inner": 40},
    "gpt2, relu, untied": {"activation_function": "relu", "tie_word_embeddings": False},
}
LLAMAS = {
    "llama": {},
    "llama, grouped": {"num_key_value_heads": 2},
    "llama, one key head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama, biases, wide heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "llama, other base and eps": {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}, "rms_norm_eps": 0.1},
    "llama 3.1": {"rope_parameters": LLAMA3},
}
CASES = [(GPT2LMHeadModel, gpt2_config(**changes)) for changes in GPT2S.values()] + [
    (LlamaForCausalLM, llama_config(**changes)) for changes in LLAMAS.values()
]


@pytest.mark.parametrize(("kind", "config"), CASES, ids=[*GPT2S, *LLAMAS])
def test_logits_are_transformers_own_there_and_back(kind: type[PreTrainedModel], config: Any):
    theirs = drawn(kind, config)
    ours = as_explicit(theirs)
    back = as_transformers(ours)
    assert type(back) is kind
    ids = torch.randint(0, 90, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.std() > 0.3
        torch.testing.assert_close(ours(ids).logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(back(ids).logits, expected, atol=1e-5, rtol=1e-5)
    tied = config.tie_word_embeddings
    assert (ours.lm_head.weight is ours.model.decoder.embed_tokens.weight) == tied
    assert sum(weight.numel() for weight in ours.parameters()) == sum(weight.numel() for weight in theirs.parameters())
    assert explicit_config(back.config).to_dict() == ours.config.to_dict() | {"architectures": None, "dtype": None}


def test_weights_are_copies():
    theirs = drawn(LlamaForCausalLM, llama_config())
    ours = as_explicit(theirs)
    before = theirs.model.layers[0].mlp.up_proj.weight.clone()
    with torch.no_grad():
        ours.model.decoder.layers[0].feed_forward.up_proj.weight.zero_()
    assert torch.equal(theirs.model.layers[0].mlp.up_proj.weight, before)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (llama_config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), "rope_type: linear"),
        (
            llama_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            "partial_rotary_factor: 0.5",
        ),
        (llama_config(hidden_act="gelu"), "hidden_act: gelu"),
        (llama_config(sliding_window=8), "sliding_window: 8"),
        (gpt2_config(activation_function="silu"), "activation_function: silu"),
        (gpt2_config(scale_attn_weights=False), "scale_attn_weights: False"),
        (gpt2_config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx: True"),
        (gpt2_config(add_cross_attention=True), "add_cross_attention: True"),
        (llama_config(is_causal=False), "is_causal: False"),
        (gpt2_config(is_causal=False), "is_causal: False"),
        (MistralConfig(), "a mistral model is not supported"),
    ],
)
def test_what_we_have_not_is_refused_by_name(config: Any, named: str):
    with pytest.raises(ModelError, match=named):
        explicit_config(config, "acme/odd")


def test_other_classes_are_refused():
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    mistral = MistralForCausalLM(MistralConfig(**small, num_key_value_heads=1, vocab_size=20))
    with pytest.raises(ModelError, match="cannot convert `acme/odd`: MistralForCausalLM is not supported"):
        as_explicit(mistral, "acme/odd")
    with pytest.raises(ModelError, match="LlamaForSequenceClassification is not supported"):
        as_explicit(LlamaForSequenceClassification(llama_config()))


def test_mixed_parts_have_no_other_name():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    mixed = TransformerForCausalLM(TransformerConfig(norm="layer", vocab_size=20, **sizes))
    with pytest.raises(ModelError, match=r"GPT-2 has no `positions: rotary`; Llama has no `norm: layer`"):
        as_transformers(mixed, "mine")


SMALL = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 20}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"positions": "learned", "num_attention_heads": 32}, "GPT-2 has no `norm: rms`; as a Llama, rotary positions"),
        ({"hidden_size": 20, "num_attention_heads": 3, "head_dim": 8}, "as a GPT-2, .*; as a Llama, "),
        ({"positions": "sinusoidal"}, "GPT-2 has no `positions: sinusoidal`"),
    ],
)
def test_sizes_that_a_family_cannot_have_are_a_reason_and_no_traceback(changes: dict[str, Any], named: str):
    model = TransformerForCausalLM(TransformerConfig(**(SMALL | changes)))
    with pytest.raises(ModelError, match=named) as caught:
        as_transformers(model, "mine")
    assert caught.value.hint


def test_only_explicit_decoders_are_exported(tiny: Callable[..., PreTrainedModel]):
    for model in (drawn(LlamaForCausalLM, llama_config()), tiny(architecture="encoder-decoder")):
        with pytest.raises(
            ModelError,
            match=f"cannot export `mine`: it must be a built-in transformer \\(decoder\\), got {type(model).__name__}",
        ):
            as_transformers(model, "mine")  # pyright: ignore[reportArgumentType]


def with_extra(model: PreTrainedModel) -> PreTrainedModel:
    model.get_decoder().layers[1].extra = torch.nn.Linear(32, 32)
    return model


def with_lora(model: PreTrainedModel) -> PreTrainedModel:
    return inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)


@pytest.mark.parametrize(
    ("change", "weight"), [(with_extra, r"layers\.1\.extra\.weight"), (with_lora, "q_proj.*lora|base")]
)
def test_weights_that_would_be_lost_are_refused_both_ways(change: Callable[..., Any], weight: str):
    theirs = drawn(LlamaForCausalLM, llama_config())
    ours = as_explicit(theirs)
    with pytest.raises(ModelError, match=f"weights that a plain Llama does not have, such as `.*{weight}") as caught:
        as_explicit(change(theirs))
    assert caught.value.hint
    with pytest.raises(ModelError, match=f"weights that a plain Llama does not have, such as `.*{weight}"):
        as_transformers(change(ours))


def test_weights_that_are_not_there_are_no_traceback():
    theirs = drawn(LlamaForCausalLM, llama_config())
    del theirs.model.layers[1].mlp.up_proj
    with pytest.raises(ModelError, match=r"do not fit its configuration.*layers\.1\.feed_forward\.up_proj"):
        as_explicit(theirs)


def test_generation_settings_are_a_copy():
    theirs = drawn(LlamaForCausalLM, llama_config())
    as_explicit(theirs).generation_config.max_new_tokens = 77
    assert theirs.generation_config.max_new_tokens != 77


@pytest.mark.parametrize("spoilt", [1.01, float("nan")])
def test_nothing_is_written_where_logits_differ(
    spoilt: float, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
):
    def spoiling(model: PreTrainedModel, name: str) -> TransformerForCausalLM:
        explicit = as_explicit(model, name)
        with torch.no_grad():
            explicit.lm_head.weight.mul_(spoilt)
        return explicit

    monkeypatch.setattr(checkpoints, "as_explicit", spoiling)
    with pytest.raises(ModelError, match="computes different logits after conversion"):
        convert(str(tiny_llama), tmp_path / "explicit")
    assert not (tmp_path / "explicit").exists()


def test_a_short_context_is_probed_within_its_positions(tmp_path: Path):
    parts = {"positions": "learned", "norm": "layer", "feed_forward": "gelu-tanh", "biases": "all"}
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "feed_forward_size": 16, "vocab_size": 260}
    build_model(tmp_path / "short", ["text"], BuildSettings(context_length=8, **sizes, **parts), seed=0)
    convert(str(tmp_path / "short"), tmp_path / "explicit")
    export(str(tmp_path / "explicit"), tmp_path / "gpt2", "llama")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")) is GPT2LMHeadModel


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_convert_and_export_write_folders_that_load(
    family: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
):
    folder = request.getfixturevalue(family)
    convert(str(folder), tmp_path / "explicit")
    export(str(tmp_path / "explicit"), tmp_path / "back", "llama")
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'explicit'}\n{tmp_path / 'back'}\n"
    assert "-> TransformerForCausalLM: logits of 16 tokens differ by at most" in printed.err
    ids = load_tokenizer(ModelSource(str(tmp_path / "explicit")))("The cat sat", return_tensors="pt").input_ids
    assert torch.equal(ids, AutoTokenizer.from_pretrained(folder)("The cat sat", return_tensors="pt").input_ids)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "back")) is type(theirs)
    with torch.no_grad():
        for place in ("explicit", "back"):
            found = load_policy(ModelSource(str(tmp_path / place)))(ids).logits
            torch.testing.assert_close(found, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="already exists"):
        convert(str(folder), tmp_path / "explicit")


def test_bfloat16_checkpoint_stays_bfloat16(tmp_path: Path, tiny_llama: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "half")
    convert(str(tmp_path / "half"), tmp_path / "explicit")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "explicit", dtype="auto")
    assert kept.dtype == torch.bfloat16
    assert torch.equal(
        kept.model.decoder.layers[1].self_attention.v_proj.weight, model.model.layers[1].self_attn.v_proj.weight
    )


@pytest.mark.real
def test_smollm2_is_itself(real_model: Path):
    source = ModelSource(str(real_model))
    theirs = load_policy(source)
    ours = as_explicit(theirs)
    assert ours.config.num_key_value_heads < ours.config.num_attention_heads
    assert ours.config.tie_word_embeddings
    text = "Water the basil in the morning, when the soil feels dry."
    ids = load_tokenizer(source)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(ids, **settings), theirs.generate(ids, **settings))
