"""The policy on disk is the policy that was trained, also where its update is smaller than bfloat16's grid."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlhf_cli.data.examples import Example
from rlhf_cli.errors import ModelError
from rlhf_cli.generation import policy_saving
from rlhf_cli.generation.policy_saving import TrainedAdapter, save_policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.base_model import hash_weights
from rlhf_cli.models.loading import ModelSource, as_stored, load_policy, load_tokenizer
from rlhf_cli.models.lora import add_lora
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.stages.common import load_policy as stage_load_policy
from rlhf_cli.stages.ppo import model_saving as ppo_saving
from rlhf_cli.stages.ppo import run as ppo
from rlhf_cli.stages.sft import run as sft
from tests.conftest import CHAT_TEMPLATE
from tests.stages.context import stage_context

IDS = torch.tensor([[5, 60, 7, 80, 9, 100, 11, 12]])
PROBE = [Example([5, 60, 7], [80, 9, 100]), Example([11, 12], [13, 140])]
LORA = LoraSettings(rank=4, alpha=6.0)
BF16 = {"dtype": torch.bfloat16, "precision": torch.bfloat16}


@pytest.fixture(scope="module", params=["tiny_qwen2", "tiny_gpt2"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model stored in bfloat16, with weights as large as those of a trained model of this width."""
    folder = request.getfixturevalue(request.param)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8.0 if weight.ndim > 1 else 1.0)
    out = tmp_path_factory.mktemp("models") / f"{request.param}-bfloat16"
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


def logits(model: PreTrainedModel, precision: torch.dtype = torch.float32) -> Tensor:
    """By transformers' own forward pass."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        return model(input_ids=IDS).logits.double()


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p || q) in nats per token."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def in_float32(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def run_stage(name: str, model: Path, folder: Path, adapter: str, precision: str) -> Any:
    """Run `sft` or `ppo` at a learning rate of 1e-5 and return its outcome; the artifact is `folder/NAME`."""
    data, reward = folder / f"{name}.jsonl", folder / "reward.py"
    rows = [{"prompt": f"What is {n}?", "completion": f" It is {n}."} for n in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward.write_text("def score(prompts, completions):\n    return [float(len(c)) for c in completions]\n")
    function = f"{reward}:score"
    common = {"learning_rate": 1e-5, "adapter": adapter} | ({"lora": LORA.model_dump()} if adapter == "lora" else {})
    sections = {
        "sft": {"data": str(data), "batch_size": 4, "epochs": 6} | common,
        "ppo": {"rewards": [{"function": function}], "steps": 4, "prompts_per_step": 8, "max_new_tokens": 6} | common,
    }
    shared = {"path": str(model), "precision": precision, "attention": "eager"}
    recipe = Recipe.model_validate({"model": shared, "data": {"holdout": 0.2}, name: sections[name]})
    output, work = folder / name, folder / f"{name}.work"
    output.mkdir()
    work.mkdir()
    if name == "sft":
        return sft.run(stage_context(name, recipe, output=output, work=work, base=model, demonstrations=data))
    inputs: dict[str, Any] = {"policy": model, "prompts": data, "rewards": (function,)}
    return ppo.run(stage_context(name, recipe, output=output, work=work, **inputs))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, Tensor]:
    """Logits of the model that a stage gives to `save_policy`, before anything is done to it, by precision."""
    seen: dict[torch.dtype, Tensor] = {}

    def watched(model: PreTrainedModel, *arguments: Any, **named: Any) -> float:
        precision = named["source"].precision
        seen[precision] = logits(model.eval(), precision)
        return save_policy(model, *arguments, **named)

    monkeypatch.setattr(policy_saving, "save_policy", watched)
    monkeypatch.setattr(ppo_saving, "save_policy", watched)
    return seen


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_policy_is_written_as_it_was_trained(stage, adapter, stored, trained, tmp_path):
    outcome = run_stage(stage, stored, tmp_path, adapter, "float32")
    written = logits(in_float32(tmp_path / stage))
    assert abs(kl(trained[torch.float32], written)) < 1e-6
    assert 0 <= outcome.metrics["written_kl"] < 1e-9
    # The update is there, and bfloat16 would lose most of it.
    base, found = load_file(stored / "model.safetensors"), load_file(tmp_path / stage / "model.safetensors")
    names = [name for name in base if not torch.equal(base[name].float(), found[name])]
    update = torch.cat([(found[name] - base[name].float()).flatten() for name in names])
    rounded = torch.cat([(found[name].bfloat16().float() - base[name].float()).flatten() for name in names])
    assert update @ rounded / (update @ update) < 0.7


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_later_stages_load_it_as_it_was_trained_in_bfloat16_too(stage, adapter, stored, trained, tmp_path):
    """Products of merged weights would be rounded: the adapter is kept apart, as in training."""
    run_stage(stage, stored, tmp_path, adapter, "bfloat16")
    source = as_stored(ModelSource(str(tmp_path / stage), attention="eager", **BF16))
    loaded, merged = load_policy(source), load_policy(replace(source, is_merged=True))
    expected = trained[torch.bfloat16]
    assert abs(kl(expected, logits(loaded, torch.bfloat16))) < 1e-6
    assert adapter == "none" or kl(expected, logits(merged, torch.bfloat16)) > 1e-6


@pytest.mark.parametrize("before", ["float32", "bfloat16"])
def test_ppo_starts_in_bfloat16_from_the_sft_model_as_trained(before, stored, trained, tmp_path):
    run_stage("sft", stored, tmp_path, "lora", before)
    run_stage("ppo", tmp_path / "sft", tmp_path, "lora", "bfloat16")
    source = ModelSource(str(tmp_path / "ppo"), attention="eager", **BF16)
    assert abs(kl(trained[torch.bfloat16], logits(load_policy(source), torch.bfloat16))) < 1e-4  # two adapters, one sum
    weights = {key: weight for key, weight in load_policy(source).state_dict().items() if key.endswith("weight")}
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, before)}
    base = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(weights[key].bfloat16(), base[key]) for key in weights)
    assert {path.parent.name for path in (tmp_path / "ppo").rglob("base.json")} == {"adapter", "base_adapter"}


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_evaluation_keeps_weights_that_are_stored_in_float32(dtype, expected, tiny_llama, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    recipe = Recipe.model_validate({"model": {"precision": "bfloat16", "dtype": dtype}, "evaluate": {}})
    context = stage_context(
        "evaluate", recipe, output=tmp_path, work=tmp_path, policy=tiny_llama, baseline=tiny_llama, prompts=prompts
    )
    with stage_load_policy(context, str(tiny_llama), Sampling()).model() as model:
        assert {weight.dtype for weight in model.parameters()} == {expected}


def adapted(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, ModelSource]:
    """A model with an adapter whose update is large beside the bound, and small beside the weights."""
    source = ModelSource(str(folder), attention="eager", dtype=dtype, precision=dtype)
    model = load_policy(source)
    torch.manual_seed(0)
    with torch.no_grad():
        for factor in add_lora(model, LORA):
            factor.add_(torch.randn_like(factor), alpha=2e-2)
    return model, source


def write(model: PreTrainedModel, source: ModelSource, folder: Path) -> float:
    adapter, tokenizer = TrainedAdapter("default", LORA), load_tokenizer(source)
    tokenizer.chat_template = CHAT_TEMPLATE
    return save_policy(model, tokenizer, folder, source=source, probe=PROBE, adapter=adapter)


def test_the_adapter_beside_it_names_its_base_and_loads_with_peft(stored, tmp_path):
    model, source = adapted(stored)
    expected = logits(model)
    assert write(model, source, tmp_path / "out") < 1e-9
    base = json.loads((tmp_path / "out/adapter/base.json").read_text())
    assert base == {"path": str(stored), "revision": None, "sha256": hash_weights(str(stored)), "dtype": "float32",
                    "quantize": "none"}  # fmt: skip
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(stored)
    theirs = PeftModel.from_pretrained(in_float32(stored), tmp_path / "out/adapter")
    torch.testing.assert_close(logits(theirs.get_base_model()), expected, atol=1e-5, rtol=1e-4)  # type: ignore[arg-type]


def spoil(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `change(folder)` follow the writing of the model."""
    save = policy_saving.save_model_folder

    def spoiled(model, tokenizer, folder, **named):
        save(model, tokenizer, folder, **named)
        change(folder)

    monkeypatch.setattr(policy_saving, "save_model_folder", spoiled)


def _rounded(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({key: value.bfloat16() for key, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def _one_tensor_of_the_base(folder: Path) -> None:
    tensors, base = load_file(folder / "model.safetensors"), json.loads((folder / "adapter/base.json").read_text())
    untrained = load_file(Path(base["path"]) / "model.safetensors")
    key = next(key for key in tensors if not torch.equal(tensors[key], untrained[key].float()))
    save_file(tensors | {key: untrained[key].float()}, folder / "model.safetensors", {"format": "pt"})


def _other_scale(folder: Path) -> None:
    path = folder / "adapter/adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 6.0', '"lora_alpha": 12.0'))


def _stale_adapter(folder: Path) -> None:
    """The adapter of an earlier step."""
    path = folder / "adapter/adapter_model.safetensors"
    save_file({key: value * 0.99 for key, value in load_file(path).items()}, path, {"format": "pt"})


def _dropped_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[sorted(tensors)[3]]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _other_end(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "a"}))


@pytest.mark.parametrize(
    ("change", "dtype", "problem"),
    [
        pytest.param(_rounded, torch.float32, "is BF16 in model.safetensors, and must be F32", id="wrong dtype"),
        pytest.param(_one_tensor_of_the_base, torch.float32, "their KL is", id="a tensor without its update"),
        pytest.param(_one_tensor_of_the_base, torch.bfloat16, "their KL is", id="the same, split again at loading"),
        pytest.param(_other_scale, torch.float32, "alpha / rank is 3 in its configuration, and was 1.5", id="scale"),
        pytest.param(_stale_adapter, torch.float32, "has other values", id="a stale adapter"),
        pytest.param(_stale_adapter, torch.bfloat16, "has other values", id="the same in bfloat16"),
        pytest.param(_no_template, torch.float32, "has another chat template", id="no template"),
        pytest.param(_other_end, torch.float32, "has another special token", id="another end token"),
    ],
)
def test_a_policy_that_was_not_written_as_trained_is_refused(change, dtype, problem, stored, tmp_path, monkeypatch):
    model, source = adapted(stored, dtype)
    spoil(change, monkeypatch)
    with pytest.raises(ModelError, match="is not the model that was trained") as caught:
        write(model, source, tmp_path / "out")
    assert problem in caught.value.message
    assert "run the command again" in (caught.value.hint or "")


def test_a_policy_without_one_of_its_tensors_is_refused(stored, tmp_path, monkeypatch):
    model, source = adapted(stored)
    spoil(_dropped_tensor, monkeypatch)
    with pytest.raises(ModelError, match=r"1 weight of a \w+ model is missing"):
        write(model, source, tmp_path / "out")


def test_nothing_is_loaded_onto_the_device(stored, tmp_path, monkeypatch):
    """The model would be on a GPU, which this machine need not have."""
    model, source = adapted(stored)
    devices: set[str] = set()
    to = nn.Module.to

    def watched(self, *arguments, **named):
        devices.add(torch.device(*arguments).type)
        return to(self, *arguments, **named)

    monkeypatch.setattr(nn.Module, "to", watched)
    assert write(model, replace(source, device=torch.device("cuda"), attention="sdpa"), tmp_path / "out") < 1e-9
    assert devices == {"cpu", "meta"}
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
