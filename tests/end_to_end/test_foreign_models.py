"""Whole runs from models that are no plain folders: with their own code, as a PEFT adapter, quantized."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_cli.models.loading import ModelSource, load_policy
from tests.models.test_checkpoints import changed, to_fp8
from tests.models.test_peft_folder import IDS, LoraConfig, write_adapter
from tests.models.test_remote_code import _CONFIGURATION, _MODEL

pytestmark = pytest.mark.slow

RECIPE = """
model: {path: MODEL, precision: float32, threads: 1, MORE}
data: {prompts: prompts.jsonl, prompt_template: null, holdout: 0.3}
sampling: {max_new_tokens: 6}
sft: {data: demos.jsonl, epochs: 1, batch_size: 4, max_length: 64, adapter: lora}
ppo: {steps: 1, prompts_per_step: 2, epochs: 1, reward_model: null, rewards: [{function: "score.py:score"}]}
evaluate: {judge_function: "score.py:score", max_prompts: 2}
"""


def run_recipe(rlhf_here, folder: Path, model: Path, more: str = "attention: sdpa") -> Path:
    texts = [f"Question {number}?" for number in range(24)]
    demos = [{"prompt": text, "completion": f" Answer {text}"} for text in texts]
    (folder / "demos.jsonl").write_text("".join(json.dumps(one) + "\n" for one in demos))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    (folder / "score.py").write_text(
        "def score(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
    )
    (folder / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(model)).replace("MORE", more))
    code, said = rlhf_here("run", "recipe.yaml", "--run-dir", "run")
    assert code == 0, said
    return folder / "run"


def test_a_model_with_its_own_code(tiny_llama: Path, rlhf_here, tmp_path: Path, own_modules: Path):
    folder = tmp_path / "own-model"
    shutil.copytree(tiny_llama, folder)
    (folder / "configuration_own.py").write_text(_CONFIGURATION)
    (folder / "modeling_own.py").write_text(_MODEL)
    auto = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": "own", "auto_map": auto}))
    run = run_recipe(rlhf_here, tmp_path, folder, "trust_remote_code: true, revision: main")
    assert (run / "ppo/modeling_own.py").read_text() == _MODEL
    model = load_policy(ModelSource(str(run / "ppo"), trust_remote_code=True))
    assert type(model).__name__ == "OwnForCausalLM"
    models = ("--baseline", "run/sft", "--policy", "run/ppo", "--set", "evaluate.judge_function=score.py:score")
    skips = ("--set", "evaluate.trained_prompts=skip")
    code, said = rlhf_here("evaluate", *models, "--prompts", "prompts.jsonl", *skips)
    assert code == 65
    assert "comes with Python code of its own" in said


def test_an_adapter_of_peft(tiny_qwen3: Path, rlhf_here, tmp_path: Path):
    write_adapter(tiny_qwen3, tmp_path / "adapter", LoraConfig(r=2, target_modules=["v_proj"], use_dora=True))
    shutil.copy(tiny_qwen3 / "tokenizer.json", tmp_path / "adapter")
    shutil.copy(tiny_qwen3 / "tokenizer_config.json", tmp_path / "adapter")
    run = run_recipe(rlhf_here, tmp_path, tmp_path / "adapter")
    assert not (run / "ppo/adapter_config.json").exists()
    assert type(load_policy(ModelSource(str(run / "ppo")))).__name__ == "Qwen3ForCausalLM"


def test_an_fp8_checkpoint(tiny_qwen3: Path, rlhf_here, tmp_path: Path):
    setting = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    folder = changed(tiny_qwen3, tmp_path / "fp8", lambda w: to_fp8(w, 16), quantization_config=setting)
    run = run_recipe(rlhf_here, tmp_path, folder)
    assert "quantization_config" not in json.loads((run / "ppo/config.json").read_text())
    ours = load_policy(ModelSource(str(run / "ppo")))
    theirs = AutoModelForCausalLM.from_pretrained(run / "ppo").eval()
    assert torch.allclose(ours(IDS).logits, theirs(IDS).logits, atol=1e-5)
