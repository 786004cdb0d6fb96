"""What is wrong with a model is found before the first stage, all at once, from headers and small files."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from rlhf_cli.models.findings import Findings, ModelUse
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.preflight import check_model
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import new_reward_model
from rlhf_cli.models.role import ModelRole
from rlhf_cli.settings.shared import LoraSettings


def check(folder: Path, role: ModelRole = "policy", **use) -> Findings:
    return check_model(ModelUse(ModelSource(str(folder)), role, **use))


def errors(folder: Path, role: ModelRole = "policy", **use) -> list[str]:
    found = check(folder, role, **use)
    assert all(error.hint for error in found.errors)
    return [error.message for error in found.errors]


@pytest.fixture
def copied(tmp_path):
    """Copies a model folder and changes fields of its JSON files; None drops one."""

    def copy(folder: Path, file: str = "", **fields) -> Path:
        target = tmp_path / "copy"
        shutil.copytree(folder, target)
        if file:
            path = target / file
            content = json.loads(path.read_text()) if path.exists() else {}
            for name, value in fields.items():
                content.pop(name, None) if value is None else content.update({name: value})
            path.write_text(json.dumps(content))
        return target

    return copy


@pytest.fixture
def trained(tiny_llama, tmp_path):
    """Writes a reward model trained from `tiny_llama`."""

    def train(*, lora: bool, base: Path = tiny_llama) -> Path:
        folder = tmp_path / "rm"
        folder.mkdir()
        model = new_reward_model(ModelSource(str(base)), template="chat", lora=LoraSettings(rank=2) if lora else None)
        save_reward_model(model, folder)
        return folder

    return train


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_t5", "tiny_bart", "tiny_qwen3", "tiny_neox"])
def test_sound_models_have_no_findings_and_take_no_time(name, request):
    folder = request.getfixturevalue(name)
    check(folder)
    began = time.monotonic()
    found = check(folder, max_new_tokens=16)
    assert time.monotonic() - began < 2
    assert (found.errors, found.warnings) == ([], [])


@pytest.mark.parametrize(
    ("name", "role", "said"),
    [
        ("tiny_llama", "start of a reward model", None),
        ("tiny_bert", "start of a reward model", None),
        ("tiny_llama", "judge", None),
        ("tiny_bert", "policy", "cannot generate text"),
        ("tiny_llama", "reward model", "has no reward head"),
        ("tiny_t5", "reward model", "encoder-decoder cannot be a reward model"),
        ("tiny_t5", "judge", "cannot be a judge"),
    ],
)
def test_an_architecture_fits_its_role(name, role, said, request):
    found = errors(request.getfixturevalue(name), role)
    assert found == [] if said is None else said in found[0]


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "full"])
def test_our_reward_models_pass_and_only_the_full_one_can_be_trained_on(trained, lora):
    folder = trained(lora=lora)
    assert errors(folder, "reward model") == []
    refused = errors(folder, "start of a reward model")
    assert bool(refused) == lora
    assert not lora or "saved as an adapter" in refused[0]


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        ("config.json", {"pad_token_id": 320}, "`pad_token_id` in config.json is 320, and the embedding has 320 rows"),
        ("config.json", {"hidden_size": "wide"}, "config.json: `hidden_size`"),
        ("config.json", {"num_hidden_layers": 10**9}, "`num_hidden_layers` in config.json is 1,000,000,000"),
        ("config.json", {"vocab_size": 321}, "shape"),
        ("config.json", {"model_type": "gpt2"}, "missing"),
        ("config.json", {"model_type": "no-such-type"}, "no-such-type"),
        ("config.json", {"hidden_act": "no-such"}, "no-such"),
        ("config.json", {"quantization_config": {"quant_method": "awq", "bits": 4}}, "quant_method: awq"),
        ("tokenizer_config.json", {"add_special_tokens": True}, "tokenizer_config.json: `add_special_tokens`"),
        ("tokenizer_config.json", {"tokenizer_class": 5}, "without `tokenizer_class` it can be loaded"),
        ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer"}, "cannot encode text"),
        ("tokenizer_config.json", {"model_max_length": "long"}, "without `model_max_length` it can be loaded"),
        ("tokenizer_config.json", {"eos_token": None}, "no end-of-text token"),
        (
            "tokenizer_config.json",
            {"eos_token": "<|new|>"},
            "1 tokens of the tokenizer are beyond it, such as '<|new|>'",
        ),
        ("generation_config.json", {"eos_token_id": "x"}, "generation_config.json: `eos_token_id`"),
        ("generation_config.json", {"max_new_tokens": "many"}, "generation_config.json"),
        ("generation_config.json", {"pad_token_id": [3]}, "generation_config.json"),
        ("config.json", {"architectures": -1}, None),
    ],
)
def test_each_file_and_field_is_named(copied, tiny_llama, file, fields, said):
    found = errors(copied(tiny_llama, file, **fields))
    assert found == [] if said is None else (len(found) == 1 and said in found[0]), found


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "[1]", "", "\udcff"], ids=["cut", "list", "empty", "bytes"])
def test_a_damaged_json_file_is_named(copied, tiny_llama, file, content):
    folder = copied(tiny_llama)
    (folder / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    found = errors(folder)
    assert any(file in message for message in found), found


def test_several_problems_are_found_at_once(copied, tiny_llama):
    folder = copied(tiny_llama, "tokenizer_config.json", add_special_tokens=True)
    (folder / "generation_config.json").write_text("{")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = errors(folder, max_new_tokens=256)
    assert len(found) == 4
    for said in (
        "`model.layers.1.mlp.up_proj.weight`",
        "generation_config.json",
        "add_special_tokens",
        "leave no room",
    ):
        assert sum(said in message for message in found) == 1


def test_tokens_beyond_the_embedding_are_errors_where_they_are_used(copied, tiny_llama):
    folder = copied(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.save_pretrained(folder)
    assert "'<|user|>' (320)" in errors(folder)[0]  # its chat template writes it
    found = check(folder, template="Q: {prompt}\nA:")
    assert found.errors == []
    assert "1 special tokens of the tokenizer are beyond the 320 rows" in found.warnings[0]
    tokenizer.add_tokens(["plain"])
    tokenizer.save_pretrained(folder)
    assert "'plain' (321)" in errors(folder, template="Q: {prompt}\nA:")[0]  # any text may spell it


@pytest.mark.parametrize("template", ["{% for %}", "{{ messages[7].content.x }}", "{{ raise_exception('no') }}"])
def test_a_template_that_fails_is_an_error_where_it_is_used(copied, tiny_llama, template):
    folder = copied(tiny_llama)
    (folder / "chat_template.jinja").write_text(template)
    assert "chat template" in errors(folder)[0]
    assert errors(folder, template="{prompt}") == []


def test_a_chat_template_that_is_asked_for_must_exist(tiny_gpt2):
    assert "needs a chat template" in errors(tiny_gpt2, template="chat")[0]
    assert "needs a chat template" not in "".join(errors(tiny_gpt2, "start of a reward model", template="chat"))


@pytest.mark.parametrize(("tokens", "fits"), [(255, True), (256, False), (4_000, False)])
def test_completions_leave_room_for_a_prompt(tiny_llama, tokens, fits):
    assert bool(errors(tiny_llama, max_new_tokens=tokens)) != fits


@pytest.mark.parametrize(("file", "package"), [("tokenizer.model", "sentencepiece"), ("tekken.json", "mistral_common")])
def test_a_tokenizer_in_another_format_names_its_package(copied, tiny_llama, monkeypatch, file, package):
    folder = copied(tiny_llama)
    (folder / "tokenizer.json").rename(folder / file)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert errors(folder) == [f"`{folder}` has its tokenizer in {file} alone, which needs the package {package}"]


def test_code_that_comes_with_a_model_is_named(copied, tiny_llama):
    own = {"AutoConfig": "configuration_mine.MineConfig"}
    folder = copied(tiny_llama, "config.json", auto_map=own)
    assert "configuration_mine.MineConfig" in check(folder).warnings[0]
    shutil.rmtree(folder)
    folder = copied(tiny_llama, "config.json", auto_map=own, model_type="mine")
    (error,) = check(folder).errors
    assert "configuration_mine.MineConfig" in error.message
    assert "model.trust_remote_code" in (error.hint or "")


def test_a_peft_adapter_is_checked_with_its_base(tmp_path, tiny_llama):
    folder = tmp_path / "adapter"
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), lora).save_pretrained(folder)
    assert errors(folder) == errors(folder, "start of a reward model") == []
    assert "has no reward head" in errors(folder, "reward model")[0]
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "../nowhere"}))
    assert "`../nowhere`, which is not there" in errors(folder)[0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"std": 0.0}, "`std` cannot be 0.0"),
        ({"mean": "x"}, "`mean` cannot be 'x'"),
        ({"kind": "other"}, "`kind` cannot be 'other'"),
        ({"hidden_size": 33}, "not a reward head of width 33"),
        ({"base": "../nowhere"}, "which is not there"),
        ({"format": 99}, "format must be 1"),
        ({"template": "chat"}, None),
    ],
)
def test_reward_json_is_checked(trained, fields, said):
    folder = trained(lora=True)
    content = json.loads((folder / "reward.json").read_text()) | fields
    (folder / "reward.json").write_text(json.dumps(content))
    found = errors(folder, "reward model")
    assert found == [] if said is None else said in found[0], found


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("adapter/adapter_config.json", "cannot load an adapter"),
        ("adapter/adapter_model.safetensors", "no weights"),
        ("head.safetensors", "head"),
    ],
)
def test_every_file_of_an_adapter_is_needed(trained, file, said):
    folder = trained(lora=True)
    (folder / file).unlink()
    assert said in errors(folder, "reward model")[0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target_modules": 7}, "`target_modules` cannot be 7"),
        ({"target_modules": ["layers.0.mlp.up_proj"]}, "does not name"),
        ({"r": None}, "`r` is None"),
        ({"r": 3}, "says `r` is 3"),
        ({"use_rslora": True}, "only plain LoRA"),
        ({"alora_invocation_tokens": [1]}, "only plain LoRA"),
        ({"task_type": "SEQ_CLS"}, None),
    ],
)
def test_the_configuration_of_our_adapters_is_checked(trained, fields, said):
    folder = trained(lora=True)
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    found = errors(folder, "reward model")
    assert found == [] if said is None else said in found[0], found


def test_the_layers_of_our_adapters_are_layers_of_their_base(trained):
    folder = trained(lora=True)
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("layers.1.", "layers.7."): one for name, one in load_file(file).items()}, file)
    assert any("layers.7" in message for message in errors(folder, "reward model"))


def test_labels_of_a_classifier_are_counted_in_its_head(tmp_path, tiny_llama):
    config = LlamaConfig.from_pretrained(tiny_llama, num_labels=3)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "three")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "three")
    assert "one label, got 3" in errors(tmp_path / "three", "reward model")[0]


def test_weights_of_two_sizes_and_a_head_of_another_width(tmp_path, tiny_llama):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "untied")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "untied")
    assert errors(tmp_path / "untied") == []
    weights = load_file(tmp_path / "untied" / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].clone()
    save_file(weights, tmp_path / "untied" / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight" in errors(tmp_path / "untied")[0]
