"""`ppo.critic_from`: a keyword counts as a setting; a folder counts by its content, not its name."""

from __future__ import annotations

import importlib.util
import json

import pytest

from rlhf_cli.pipeline.fingerprint import settings_of
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.registry import stages


def save_critic(toy, folder: str, weights: str = "adapter") -> None:
    toy.write(f"{folder}/value_head.safetensors", "head")
    toy.write(f"{folder}/adapter_model.safetensors", weights)


def identity(toy) -> dict:
    return json.loads((toy.folder / "runs/toy/ppo/manifest.json").read_text())["identity"]


def test_a_keyword_is_a_setting_even_if_a_folder_has_its_name(finished):
    finished.write("policy/config.json", "{}")
    assert finished.run("--set", "ppo.critic_from=policy").code == 0
    assert finished.ran() == ["ppo nothing", "evaluate nothing"]
    assert identity(finished)["settings"]["ppo.critic_from"] == "policy"
    assert "critic" not in identity(finished)["inputs"]


def test_a_folder_counts_by_its_content(finished):
    save_critic(finished, "one")
    assert finished.run("--set", "ppo.critic_from=one").code == 0
    assert finished.ran() == ["ppo nothing", "evaluate nothing"]
    assert "ppo.critic_from" not in identity(finished)["settings"]
    save_critic(finished, "moved")
    assert finished.run("--set", "ppo.critic_from=moved").code == 0
    assert finished.ran() == []
    save_critic(finished, "moved", "another adapter")
    assert finished.run("--set", "ppo.critic_from=moved").code == 0
    assert finished.ran() == ["ppo nothing", "evaluate nothing"]


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("runs/toy/critic", "runs/toy/critic: no such folder (`ppo.critic_from`)"),
        ("base", "base: contains no saved critic (`ppo.critic_from`)"),
        ("reward_model", "reward_model: no such folder (`ppo.critic_from`)"),
    ],
)
def test_an_invalid_saved_critic_is_found_before_the_first_stage(toy, start, said):
    outcome = toy.run("--set", f"ppo.critic_from={start}")
    assert outcome.code == 65
    assert said in outcome.stderr
    assert "hint: use `auto`, `reward-model`, `policy`, or the critic of an earlier run" in outcome.stderr
    assert toy.ran() == []


def test_quantize_affects_only_stages_that_train_adapters():
    sections: dict[str, dict] = {
        "sft": {"data": "d.jsonl"},
        "label": {"by": "function", "function": "f.py:f"},
        "train_rm": {},
        "ppo": {},
        "evaluate": {},
    }
    recipe = Recipe.model_validate({"model": {"path": "base", "quantize": "4bit"}} | sections)
    running = [stage for stage in stages() if recipe.section(stage.name) is not None]
    concerned = [stage.name for stage in running if settings_of(stage, recipe).get("model.quantize") == "4bit"]
    assert concerned == ["sft", "train-rm", "ppo"]


def test_quantized_weights_without_bitsandbytes_are_refused_before_the_first_stage(toy, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name))
    outcome = toy.run("--set", "model.quantize=4bit")
    assert outcome.code == 2
    assert "`model.quantize: 4bit` needs bitsandbytes, which is not installed" in outcome.stderr
    assert "hint: pip install 'rlhf-cli[quantized]'" in outcome.stderr
    assert toy.ran() == []


@pytest.mark.parametrize("section", ["sft", "train_rm", "ppo"])
def test_moments_in_8_bits_without_bitsandbytes_are_refused_before_the_first_stage(toy, monkeypatch, section):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name))
    outcome = toy.run("--set", f"{section}.optimizer=adamw-8bit")
    assert outcome.code == 2
    assert f"`{section}.optimizer: adamw-8bit` needs bitsandbytes, which is not installed" in outcome.stderr
    assert f"or remove `{section}.optimizer`" in outcome.stderr
    assert toy.ran() == []
