"""Folders that PEFT wrote, taken as models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_cli.errors import ModelError
from rlhf_cli.models.base_model import hash_weights
from rlhf_cli.models.loading import (
    ModelSource,
    as_stored,
    check_policy,
    load_any,
    load_config,
    load_policy,
    load_tokenizer,
)
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.peft_folder import find_peft_folder
from rlhf_cli.models.policy_adapter import AdapterBase, save_policy_adapter
from rlhf_cli.models.reward_model.batch import Encoded, RewardBatch
from rlhf_cli.models.reward_model.loading import load_reward_model, new_reward_model
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.stages.ppo.models import SharedBackbone

IDS = torch.arange(3, 12)[None]
TARGETS = ["q_proj", "up_proj"]


def write_adapter(base: Path, folder: Path, config, *, kind=AutoModelForCausalLM, rows: int = 0, **arguments):
    """Write an adapter with random weights as PEFT does; return the adapted model."""
    model = kind.from_pretrained(base, **arguments)
    if rows:
        model.resize_token_embeddings(rows)
    adapted = get_peft_model(model, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if any(part in name for part in ("lora_", "hada_", "ia3_", "modules_to_save")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(str(folder))
    return adapted.eval()


def edit(folder: Path, **fields) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        pytest.param(LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS), 0, id="LoRA"),
        pytest.param(LoraConfig(r=3, use_rslora=True, target_modules=TARGETS), 0, id="rslora"),
        pytest.param(LoraConfig(r=3, use_dora=True, target_modules=TARGETS), 0, id="DoRA"),
        pytest.param(
            LoraConfig(r=3, alpha_pattern={"up_proj": 40}, rank_pattern={"q_proj": 6}, target_modules=TARGETS),
            0,
            id="patterns",
        ),
        pytest.param(
            LoraConfig(r=3, target_modules=TARGETS, modules_to_save=["embed_tokens", "lm_head"]), 323, id="new tokens"
        ),
        pytest.param(IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]), 0, id="IA3"),
        pytest.param(LoHaConfig(r=3, target_modules=TARGETS), 0, id="LoHa"),
    ],
)
def test_an_adapter_is_the_model_that_peft_computes(config, rows: int, untied: Path, tmp_path: Path):
    adapted = write_adapter(untied, tmp_path / "adapter", config, rows=rows)
    source = ModelSource(str(tmp_path / "adapter"), dtype=torch.bfloat16, precision=torch.bfloat16)
    check_policy(source)
    model = load_policy(source)
    assert torch.allclose(model(IDS).logits, adapted(input_ids=IDS).logits, atol=1e-5)
    assert model.dtype == torch.float32  # in bfloat16 a small update would be rounded away
    assert as_stored(source).dtype == torch.float32
    assert not hasattr(model, "peft_config")
    base = AutoModelForCausalLM.from_pretrained(untied)
    assert not torch.allclose(model(IDS).logits[..., :320], base(IDS).logits, atol=1e-3)


@pytest.fixture(scope="module")
def untied(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "untied"
    shutil.copytree(tiny_qwen3, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3, tie_word_embeddings=False)
    torch.manual_seed(5)
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    model.save_pretrained(folder)
    return folder


def test_a_sequence_classifiers_adapter_is_a_reward_model(tiny_qwen2: Path, tmp_path: Path):
    config = LoraConfig(r=2, target_modules=TARGETS, task_type="SEQ_CLS")
    adapted = write_adapter(
        tiny_qwen2, tmp_path / "rm", config, kind=AutoModelForSequenceClassification, num_labels=1, pad_token_id=0
    )
    model = load_reward_model(ModelSource(str(tmp_path / "rm")), template=None)
    batch = RewardBatch.padded([Encoded(IDS[0].tolist())], torch.device("cpu"))
    assert float(model(batch)) == pytest.approx(float(adapted(input_ids=IDS).logits), abs=1e-5)
    going_on = new_reward_model(ModelSource(str(tmp_path / "rm")), template=None, lora=None)
    assert torch.equal(going_on.head.weight, model.head.weight)  # its head is kept, not drawn again
    with pytest.raises(ModelError, match=r"with a reward head .* generates no text"):
        load_policy(ModelSource(str(tmp_path / "rm")))
    write_adapter(tiny_qwen2, tmp_path / "two", config, kind=AutoModelForSequenceClassification, num_labels=2)
    with pytest.raises(ModelError, match="must have one label, got 2"):
        load_reward_model(ModelSource(str(tmp_path / "two")), template=None)


def test_train_rm_and_a_critic_start_from_a_policys_adapter(untied: Path, tmp_path: Path):
    """The adapter may hold a vocabulary projection, which a classifier and a backbone do not have."""
    config = LoraConfig(r=2, target_modules=[*TARGETS, "lm_head"], modules_to_save=["embed_tokens"])
    adapted = write_adapter(untied, tmp_path / "adapter", config, rows=321)
    source = ModelSource(str(tmp_path / "adapter"))
    hidden = adapted(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    for backbone in (
        new_reward_model(source, template=None, lora=LoraSettings(rank=2, alpha=2.0)).backbone,
        load_any(source.path, torch.device("cpu")),
    ):
        assert torch.allclose(backbone(IDS).last_hidden_state, hidden, atol=1e-5)


def test_the_reference_of_an_adapter_is_base_and_adapter(untied: Path, tmp_path: Path):
    """Trap 15: transformers would load base and adapter, and "adapter off" would then be the base."""
    adapted = write_adapter(untied, tmp_path / "adapter", LoraConfig(r=3, target_modules=TARGETS))
    models = SharedBackbone(load_policy(ModelSource(str(tmp_path / "adapter"))), LoraSettings(rank=2, alpha=4.0))
    with models.reference() as reference:
        assert torch.allclose(reference(IDS).logits, adapted(input_ids=IDS).logits, atol=1e-5)


def test_an_adapter_on_an_adapter_is_both(untied: Path, tmp_path: Path):
    write_adapter(untied, tmp_path / "first", LoraConfig(r=2, target_modules=TARGETS))
    merged = load_policy(ModelSource(str(tmp_path / "first")))
    merged.save_pretrained(tmp_path / "merged")
    adapted = write_adapter(tmp_path / "merged", tmp_path / "second", LoraConfig(r=2, target_modules=["v_proj"]))
    edit(tmp_path / "second", base_model_name_or_path="../first")
    both = load_policy(ModelSource(str(tmp_path / "second")))
    assert torch.allclose(both(IDS).logits, adapted(input_ids=IDS).logits, atol=1e-5)


def test_an_adapter_without_head_is_no_reward_model(tiny_qwen2: Path, tmp_path: Path):
    write_adapter(tiny_qwen2, tmp_path / "adapter", LoraConfig(r=2, target_modules=TARGETS))
    with pytest.raises(ModelError, match="has no reward head"):
        load_reward_model(ModelSource(str(tmp_path / "adapter")), template=None)


def test_where_the_base_is(tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, adapter = tmp_path / "models/base", tmp_path / "out/adapter-7"
    shutil.copytree(tiny_qwen2, base)
    write_adapter(base, adapter, LoraConfig(r=2, target_modules=TARGETS))
    source = ModelSource(str(adapter))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in (str(base), "../../models/base", "models/base"):
        edit(adapter, base_model_name_or_path=name)
        assert load_config(source).vocab_size == 320
    assert load_tokenizer(source).get_vocab() == load_tokenizer(ModelSource(str(base))).get_vocab()
    for name, message in (
        ("../gone", r"trained on `\.\./gone`, which is not there: looked for"),
        ("/models/gone", "trained on `/models/gone`, which is not there"),
        ("acme/no-such-base", "the base of the PEFT adapter .*acme/no-such-base"),
        (None, "does not say which model it was trained on"),
    ):
        edit(adapter, base_model_name_or_path=name)
        with pytest.raises(ModelError, match=message) as caught:
            check_policy(source)
        assert "`base_model_name_or_path` in" in (caught.value.hint or "")


def test_what_cannot_be_merged_or_does_not_fit_is_refused(tiny_qwen2: Path, tiny_neox: Path, tmp_path: Path):
    write_adapter(tiny_qwen2, tmp_path / "prompt", PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ModelError, match="of kind PROMPT_TUNING, which cannot be merged"):
        load_config(ModelSource(str(tmp_path / "prompt")))
    adapter = tmp_path / "adapter"
    write_adapter(tiny_qwen2, adapter, LoraConfig(r=2, target_modules=TARGETS))
    both = shutil.copytree(tiny_qwen2, tmp_path / "both")
    shutil.copytree(adapter, both, dirs_exist_ok=True)
    with pytest.raises(ModelError, match="holds a whole model and a PEFT adapter"):
        load_policy(ModelSource(str(both)))
    weights = load_file(adapter / "adapter_model.safetensors")
    lost = next(iter(weights))
    save_file({k: v for k, v in weights.items() if k != lost}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"does not fit .* is missing \(1 such"):
        load_policy(ModelSource(str(adapter)))
    edit(adapter, base_model_name_or_path=str(tiny_neox))
    with pytest.raises(ModelError, match=r"cannot be merged into|does not fit"):
        load_policy(ModelSource(str(adapter)))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin, a pickle"):
        check_policy(ModelSource(str(adapter)))


def test_our_own_adapter_is_refused_on_another_base(tiny_qwen2: Path, tmp_path: Path):
    base, policy = tmp_path / "run/base", tmp_path / "run/sft"
    shutil.copytree(tiny_qwen2, base)
    model = load_policy(ModelSource(str(base)))
    add_lora(model, LoraSettings(rank=2, alpha=4.0))
    policy.mkdir()
    told = AdapterBase("../base", None, hash_weights(str(base)), "float32", "none")
    save_policy_adapter(model, policy, "default", told, base_folder=base)
    source = ModelSource(str(policy / "adapter"))
    plain = load_policy(ModelSource(str(base)))
    assert torch.allclose(load_policy(source)(IDS).logits, plain(IDS).logits, atol=1e-6)  # B = 0
    weights = load_file(base / "model.safetensors")
    save_file({k: v * 1.01 for k, v in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="was trained on other weights"):
        load_policy(source)


def test_the_hash_of_an_adapter_includes_its_base(tiny_qwen2: Path, tmp_path: Path):
    shutil.copytree(tiny_qwen2, tmp_path / "base")
    write_adapter(tmp_path / "base", tmp_path / "adapter", LoraConfig(r=2, target_modules=TARGETS))
    before = hash_weights(str(tmp_path / "adapter"))
    weights = load_file(tmp_path / "base/model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    assert hash_weights(str(tmp_path / "adapter")) != before


def test_peft_reads_our_merge_alike(untied: Path, tmp_path: Path):
    """Merging as PEFT documents it gives the same weights, bit for bit."""
    write_adapter(untied, tmp_path / "adapter", LoraConfig(r=3, target_modules=TARGETS, use_dora=True))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(untied), str(tmp_path / "adapter"))
    expected = theirs.merge_and_unload().state_dict()  # pyright: ignore[reportCallIssue]
    ours = load_policy(ModelSource(str(tmp_path / "adapter"))).state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("adapter_config.json", "{}", "is damaged: it has no `peft_type`"),
        ("adapter_config.json", "[1]", "must hold an object, got list"),
        ("base.json", "{", "is damaged: "),
        ("base.json", '{"path": null}', "is damaged: it has no `sha256`"),
    ],
)
def test_a_damaged_file_is_named(file, content, said, tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/b"}')
    (tmp_path / file).write_text(content)
    with pytest.raises(ModelError, match=f"{file} {said}"):
        find_peft_folder(str(tmp_path))
