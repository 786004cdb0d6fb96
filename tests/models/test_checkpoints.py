"""What is loaded is what the checkpoint holds, for every role; anything else is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GptOssConfig,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)
from transformers.integrations import mxfp4

from rlhf_cli.errors import ModelError
from rlhf_cli.models.loading import ModelSource, check_policy, load_any, load_config, load_policy
from rlhf_cli.models.prequantized import from_fp8, from_mxfp4
from rlhf_cli.models.reward_model.classifier import check_classifier
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import load_reward_model, new_reward_model
from rlhf_cli.models.saving import save_model_folder
from rlhf_cli.models.weight_loading import empty_model
from rlhf_cli.models.weight_report import compare
from rlhf_cli.settings.shared import LoraSettings
from tests.conftest import byte_level_tokenizer

PROMPTS, COMPLETIONS = ["Why is the sky blue?", "Bake bread."], ["Air scatters light.", "Mix flour and water."]


def changed(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config) -> Path:
    """Copy a model folder with other weights, and other fields in its configuration; None removes a field."""
    shutil.copytree(folder, target)
    file = target / "model.safetensors"
    save_file({name: weight.clone() for name, weight in change(load_file(file)).items()}, file, {"format": "pt"})
    fields = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return target


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {(new + k.removeprefix(old) if k.startswith(old) else k): v for k, v in weights.items()}


def scores(folder: Path) -> list[float]:
    return load_reward_model(ModelSource(str(folder)), template=None).score(PROMPTS, COMPLETIONS)


@pytest.fixture(scope="module")
def classifier(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "classifier"
    shutil.copytree(tiny_qwen2, folder)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_qwen2, num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=2.0)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "base_model.model.", "_fsdp_wrapped_module."])
def test_a_wrapped_policy_is_the_policy(prefix: str, tiny_gpt2: Path, tmp_path: Path):
    folder = changed(tiny_gpt2, tmp_path / "wrapped", renamed("", prefix))
    ids = torch.arange(9)[None]
    plain, wrapped = (load_policy(ModelSource(str(one))) for one in (tiny_gpt2, folder))
    assert torch.equal(plain(ids).logits, wrapped(ids).logits)
    assert wrapped.generation_config.eos_token_id == plain.generation_config.eos_token_id
    wrapped.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == load_file(tiny_gpt2 / "model.safetensors").keys()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(renamed("score.", "regression_head."), id="other name"),
        pytest.param(renamed("score.", "v_head.summary."), id="nested name"),
        pytest.param(renamed("", "_orig_mod."), id="compiled"),
        pytest.param(lambda w: renamed("", "module.")(renamed("score.", "rm_head.")(w)), id="other name in DDP"),
    ],
)
def test_a_reward_model_under_other_names_gives_the_same_rewards(change, classifier: Path, tmp_path: Path):
    folder = changed(classifier, tmp_path / "renamed", change)
    assert check_classifier(ModelSource(str(folder)))
    # Weights lie elsewhere in memory, and on some CPUs a product's rounding depends on where.
    assert scores(folder) == pytest.approx(scores(classifier), abs=1e-5)


def test_a_stored_bias_of_the_head_counts(classifier: Path, tmp_path: Path):
    folder = changed(classifier, tmp_path / "biased", lambda w: w | {"score.bias": torch.tensor([5.0])})
    assert scores(folder) == pytest.approx([score + 5 for score in scores(classifier)], abs=1e-5)
    model = new_reward_model(ModelSource(str(folder)), template=None, lora=None)
    (tmp_path / "written").mkdir()
    save_reward_model(model, tmp_path / "written")
    assert scores(tmp_path / "written") == pytest.approx(scores(folder), abs=1e-5)


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


def adding(name: str, *shape: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: weights | {name: torch.ones(shape)}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (without("layers.1."), {}, "12 weights of a qwen2 model are missing"),
        (without("score"), {}, r"missing, such as `score\.weight`"),
        (renamed("score.", "head."), {}, r"missing, such as `score\.weight`"),
        (dict, {"num_hidden_layers": 1, "layer_types": None}, r"would not use, such as `model\.layers\.1\."),
        (dict, {"intermediate_size": 48}, r"another shape .* stored \(.*\), expected \(.*48"),
        (adding("model.norm.bias", 32), {}, r"would not use, such as `model\.norm\.bias`"),
        (
            lambda weights: adding("value_head.weight", 1, 32)(renamed("score.", "v_head.")(weights)),
            {},
            "several stored layers could be",
        ),
        (dict, {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": None}, "says 3 labels, but .* has 1 label"),
        (adding("score.weight", 4, 32), {"id2label": None, "label2id": None}, "must have one label, got 4"),
    ],
    ids=["layer", "head", "unknown head", "more layers", "sizes", "bias", "two heads", "labels", "rows"],
)
def test_what_is_not_the_model_is_refused(change, config, message: str, classifier: Path, tmp_path: Path):
    source = ModelSource(str(changed(classifier, tmp_path / "changed", change, **config)))
    for load in (check_classifier, lambda given: load_reward_model(given, template=None)):
        with pytest.raises(ModelError, match=message) as caught:
            load(source)
        assert caught.value.hint


def test_one_row_without_a_number_of_labels_is_a_reward_model(classifier: Path, tmp_path: Path):
    folder = changed(classifier, tmp_path / "silent", lambda w: w, id2label=None, label2id=None, num_labels=None)
    assert AutoConfig.from_pretrained(folder).num_labels == 2
    assert scores(folder) == scores(classifier)


def test_an_encoder_that_lacks_a_layer_is_no_reward_model(tiny_bert: Path, tmp_path: Path):
    whole = tmp_path / "whole"
    AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=1).save_pretrained(whole)
    folder = changed(whole, tmp_path / "lost", lambda w: {k: v for k, v in w.items() if ".layer.0.output" not in k})
    with pytest.raises(ModelError, match="weights of a bert model are missing"):
        check_classifier(ModelSource(str(folder)))


def test_a_new_head_is_the_only_weight_that_may_lack(tiny_qwen2: Path, tiny_bert: Path, tmp_path: Path):
    for folder in (tiny_qwen2, tiny_bert):
        assert not check_classifier(ModelSource(str(folder)))
    lost = changed(tiny_qwen2, tmp_path / "lost", lambda w: {k: v for k, v in w.items() if k != "model.norm.weight"})
    with pytest.raises(ModelError, match=r"`model\.norm\.weight`"):
        new_reward_model(ModelSource(str(lost)), template=None, lora=None)
    with pytest.raises(ModelError, match=r"`model\.norm\.weight`|`norm\.weight`"):
        load_any(str(lost), torch.device("cpu"))


def test_parts_that_are_not_used_are_said_with_their_number(capsys, tmp_path: Path):
    text = Gemma3TextConfig(
        vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    model = AutoModelForCausalLM.from_config(text)
    report = compare(model, {name: tuple(weight.shape) for name, weight in whole.state_dict().items()})
    line = report.describe_unused("acme/both") or ""
    assert not report.unexpected
    assert "vision_tower" in line, line
    assert "multi_modal_projector" in line, line


def test_untied_weights_under_a_tied_configuration_are_used_and_said(tiny_llama: Path, capsys, tmp_path: Path):
    own = torch.randn(320, 32)
    folder = changed(tiny_llama, tmp_path / "untied", lambda w: w | {"lm_head.weight": own})
    model = load_policy(ModelSource(str(folder)))
    assert torch.equal(model.lm_head.weight, own)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    assert "two matrices that differ" in capsys.readouterr().err
    save_model_folder(model, byte_level_tokenizer(), tmp_path / "again", dtype=torch.float32)
    assert not json.loads((tmp_path / "again/config.json").read_text())["tie_word_embeddings"]
    again = load_policy(ModelSource(str(tmp_path / "again")))
    ids = torch.arange(7)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def to_fp8(weights: dict[str, Tensor], block: int) -> dict[str, Tensor]:
    """Quantize linear layers as DeepSeek-V3 is: e4m3 with one scale per block, the last of a row or column smaller."""
    stored: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if not name.endswith("_proj.weight"):
            stored[name] = weight
            continue
        rows, columns = (-(-size // block) for size in weight.shape)
        scale = torch.stack([
            torch.stack([
                weight[r * block : (r + 1) * block, c * block : (c + 1) * block].abs().max() / 448
                for c in range(columns)
            ])
            for r in range(rows)
        ])  # fmt: skip
        spread = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[: weight.shape[0], : weight.shape[1]]
        stored[name] = (weight / spread).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
    return stored


def test_fp8_is_dequantized_and_written_plain(tiny_qwen3: Path, tmp_path: Path):
    setting = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [24, 24]}
    folder = changed(tiny_qwen3, tmp_path / "fp8", lambda w: to_fp8(w, 24), quantization_config=setting)
    plain, loaded = (load_policy(ModelSource(str(one))) for one in (tiny_qwen3, folder))
    for (name, weight), found in zip(plain.named_parameters(), loaded.parameters(), strict=True):
        assert torch.allclose(weight, found, rtol=1 / 16, atol=float(weight.abs().max()) / 448), name  # 3 bits
    assert not hasattr(loaded.config, "quantization_config")
    save_model_folder(loaded, byte_level_tokenizer(), tmp_path / "written", dtype=torch.float32)
    assert "quantization_config" not in json.loads((tmp_path / "written/config.json").read_text())
    ids = torch.arange(11)[None]
    assert torch.equal(load_policy(ModelSource(str(tmp_path / "written")))(ids).logits, loaded(ids).logits)


def test_one_scale_for_a_whole_weight():
    weight = torch.tensor([[1.0, -2.0], [0.5, 4.0]]).to(torch.float8_e4m3fn)
    assert torch.equal(from_fp8(weight, torch.tensor(3.0), None), torch.tensor([[3.0, -6.0], [1.5, 12.0]]))


def test_mxfp4_is_what_transformers_reads():
    torch.manual_seed(2)
    blocks = torch.randint(0, 256, (3, 6, 2, 16), dtype=torch.uint8)
    scales = torch.randint(118, 132, (3, 6, 2), dtype=torch.uint8)
    expected = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(from_mxfp4(blocks, scales), expected)


def test_an_mxfp4_checkpoint_is_loaded_plain(tmp_path: Path):
    config = GptOssConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"],
        pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    blocks = {"gate_up_proj": torch.randint(0, 256, (2, 64, 1, 16)), "down_proj": torch.randint(0, 256, (2, 32, 1, 16))}

    def packed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        experts = "model.layers.0.mlp.experts."
        stored = {name: weight for name, weight in weights.items() if name.removeprefix(experts) not in blocks}
        for name, values in blocks.items():
            stored[f"{experts}{name}_blocks"] = values.to(torch.uint8)
            stored[f"{experts}{name}_scales"] = torch.full(values.shape[:3], 120, dtype=torch.uint8)
        return stored

    folder = changed(tmp_path / "plain", tmp_path / "packed", packed, quantization_config={"quant_method": "mxfp4"})
    check_policy(ModelSource(str(folder)))
    model = load_policy(ModelSource(str(folder), attention="eager"))
    found = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    assert torch.equal(found, from_mxfp4(blocks["down_proj"].to(torch.uint8), torch.full((2, 32, 1), 120)))
    assert not hasattr(model.config, "quantization_config")


def test_masks_of_old_checkpoints_are_no_weights(tiny_gpt2: Path, tiny_neox: Path, tmp_path: Path):
    for folder, attention in ((tiny_gpt2, "transformer.h.0.attn"), (tiny_neox, "gpt_neox.layers.0.attention")):
        mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        old = {f"{attention}.bias": mask, f"{attention}.masked_bias": torch.tensor(-1e9)}
        check_policy(ModelSource(str(changed(folder, tmp_path / folder.name, lambda w, old=old: w | old))))


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes", "hqq", "mystery"])
def test_other_quantizations_are_refused_before_anything_is_loaded(method: str, tiny_qwen3: Path, tmp_path: Path):
    folder = changed(tiny_qwen3, tmp_path / "quantized", lambda w: w, quantization_config={"quant_method": method})
    for load in (load_config, check_policy, load_policy, check_classifier):
        with pytest.raises(ModelError, match=f"stored quantized .*{method}") as caught:
            load(ModelSource(str(folder)))
        assert "unquantized" in (caught.value.hint or "")


def test_eight_bits_without_a_scale_are_refused(tiny_qwen3: Path, tmp_path: Path):
    setting = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    lost = lambda w: {k: v for k, v in to_fp8(w, 32).items() if k != "model.layers.0.mlp.up_proj.weight_scale_inv"}  # noqa: E731
    folder = changed(tiny_qwen3, tmp_path / "fp8", lost, quantization_config=setting)
    with pytest.raises(ModelError, match=r"1 weights are stored in 8 bits without a scale, .*up_proj"):
        check_policy(ModelSource(str(folder)))


def test_a_generation_config_with_impossible_values_is_named(tiny_llama: Path, tmp_path: Path):
    folder = changed(tiny_llama, tmp_path / "model", lambda w: w)
    (folder / "generation_config.json").write_text("[1, 2]")
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        load_policy(ModelSource(str(folder)))


def test_an_adapter_reward_model_knows_its_base(tiny_llama: Path, tmp_path: Path):
    base = changed(tiny_llama, tmp_path / "run/sft", lambda w: w)
    model = new_reward_model(ModelSource(str(base)), template=None, lora=LoraSettings(rank=2, alpha=4.0))
    artifact = tmp_path / "run/train-rm"
    artifact.mkdir()
    save_reward_model(model, artifact)
    before = scores(artifact)
    (tmp_path / "run").rename(tmp_path / "moved")  # as a whole
    assert scores(tmp_path / "moved/train-rm") == before

    shutil.rmtree(tmp_path / "moved/sft")
    changed(tiny_llama, tmp_path / "moved/sft", lambda w: w | {"model.norm.weight": w["model.norm.weight"] * 1.001})
    with pytest.raises(ModelError, match=r"was trained on other weights than those that are now in .*moved/sft"):
        scores(tmp_path / "moved/train-rm")

    (tmp_path / "moved/train-rm").rename(tmp_path / "alone")
    with pytest.raises(ModelError, match=r"names the base model `\.\./sft`, which is not there: looked for") as caught:
        scores(tmp_path / "alone")
    assert str(tmp_path / "alone/reward.json") in (caught.value.hint or "")
    fields = json.loads((tmp_path / "alone/reward.json").read_text())
    original = changed(tiny_llama, tmp_path / "original", lambda w: w)
    (tmp_path / "alone/reward.json").write_text(json.dumps(fields | {"base": str(original)}))
    assert scores(tmp_path / "alone") == before  # as the hint says


def test_the_backbone_alone_needs_no_vocabulary_projection(tiny_gpt2: Path, tmp_path: Path):
    bare = AutoModel.from_pretrained(tiny_gpt2)
    bare.save_pretrained(tmp_path / "bare")
    found = load_any(str(tmp_path / "bare"), torch.device("cpu")).state_dict()
    assert found.keys() == bare.state_dict().keys()
    assert all(torch.equal(found[name], weight) for name, weight in bare.state_dict().items())


MIXTURE = Qwen3MoeConfig(
    vocab_size=320, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=0,
)  # fmt: skip


def reshaped(end: str, *shape: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {k: torch.ones(shape) if k.endswith(end) else v for k, v in weights.items()}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (without("experts.2.up_proj"), {}, r"1 weight of .* missing, such as `.*experts\.2\.up_proj\.weight`"),
        (without(".up_proj"), {}, r"4 weights of .* missing, such as `.*experts\.0\.up_proj\.weight`"),
        (without("experts.3."), {}, r"3 weights of .* missing, such as `.*experts\.3\.down_proj\.weight`"),
        (reshaped("experts.1.down_proj.weight", 32, 8), {}, r"shape .*experts\.1\.down_proj.*\(32, 8\), .*\(32, 16\)"),
        (dict, {"moe_intermediate_size": 24}, r"shape .*experts\.down_proj.*\(4, 32, 16\), .*\(4, 32, 24\)"),
        (dict, {"num_experts": 6, "num_local_experts": 6}, r"missing, such as `.*experts\.4\.down_proj"),
        (dict, {"num_experts": 3, "num_local_experts": 3}, "of another shape"),
    ],
    ids=["one of an expert", "a matrix of all", "the last expert", "one shape", "all shapes", "more", "fewer"],
)
def test_experts_are_compared_one_by_one(change, config, message: str, tmp_path: Path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MIXTURE).save_pretrained(tmp_path / "plain")
    check_policy(ModelSource(str(tmp_path / "plain")))
    folder = changed(tmp_path / "plain", tmp_path / "changed", change, **config)
    with pytest.raises(ModelError, match=message):
        check_policy(ModelSource(str(folder)))


def adapted(base: Path, folder: Path) -> Path:
    """A PEFT adapter that changes its base."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(folder))
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": str(base)}))
    return folder


def test_an_adapter_on_a_base_in_fp8_starts_a_reward_model(tiny_qwen3: Path, tmp_path: Path):
    setting = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [24, 24]}
    base = changed(tiny_qwen3, tmp_path / "fp8", lambda w: to_fp8(w, 24), quantization_config=setting)
    adapter = adapted(tiny_qwen3, tmp_path / "adapter")
    fields = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": str(base)}))
    for quantized in (base, adapter):
        assert not check_classifier(ModelSource(str(quantized)))
        model = new_reward_model(ModelSource(str(quantized)), template=None, lora=None).model
        assert not hasattr(model.config, "quantization_config")
    config = load_config(ModelSource(str(base)))
    empty_model(AutoModelForCausalLM, ModelSource(str(base)), config)
    assert config.quantization_config["quant_method"] == "fp8"


@pytest.mark.parametrize("leaf", ["activation_scale", "input_scale"])
def test_fixed_scales_of_inputs_are_not_needed(leaf: str, tiny_qwen3: Path, tmp_path: Path):
    setting = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}

    def static(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        stored = to_fp8(weights, 1000)  # one block
        stored = {k: v.reshape(()) if k.endswith("_scale_inv") else v for k, v in stored.items()}
        layers = [name.removesuffix(".weight_scale_inv") for name in stored if name.endswith("_scale_inv")]
        return stored | {f"{layer}.{leaf}": torch.tensor(0.5) for layer in layers}

    folder = changed(tiny_qwen3, tmp_path / "static", static, quantization_config=setting)
    plain, loaded = (load_policy(ModelSource(str(one))) for one in (tiny_qwen3, folder))
    for (name, weight), found in zip(plain.named_parameters(), loaded.parameters(), strict=True):
        assert torch.allclose(weight, found, rtol=1 / 16, atol=float(weight.detach().abs().max()) / 448), name
    lonely = changed(
        tiny_qwen3, tmp_path / "lonely", lambda w: w | {f"model.layers.0.mlp.up_proj.{leaf}": torch.ones(())}
    )
    with pytest.raises(ModelError, match=f"would not use, such as .*{leaf}"):
        check_policy(ModelSource(str(lonely)))


def test_a_merged_adapter_in_bfloat16_keeps_rotary_frequencies(tiny_llama: Path, tmp_path: Path):
    model = load_policy(ModelSource(str(adapted(tiny_llama, tmp_path / "adapter"))), dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    plain = load_policy(ModelSource(str(tiny_llama)))
    name = "model.rotary_emb.inv_freq"
    assert torch.equal(model.get_buffer(name), plain.get_buffer(name))
    assert model.get_buffer(name).dtype == torch.float32


def test_a_backbone_has_no_line_for_the_head(tiny_gpt2: Path, tmp_path: Path, capsys):
    folder = changed(tiny_gpt2, tmp_path / "headed", lambda w: w | {"lm_head.weight": w["transformer.wte.weight"]})
    load_any(str(folder), torch.device("cpu"))
    assert "are not used" not in capsys.readouterr().err
