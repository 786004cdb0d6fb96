"""A run as `export` reads it: models in the folders of finished stages, a recipe and prompts, made in a second."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from rlhf_cli.data.splits import Split
from rlhf_cli.generation.contract import Contract
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import new_reward_model
from rlhf_cli.settings.shared import LoraSettings, SamplingSettings


@pytest.fixture(scope="session")
def made_run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A run whose `sft` is a Llama and whose `train-rm` is an adapter on it; prompts are `Q: ...` as plain text."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    shutil.copytree(tiny_llama, run / "sft")
    sampling = SamplingSettings(temperature=0.7, max_new_tokens=16, stop_tokens=[])
    Contract("Q: {prompt}\nA:", {}, sampling, Split(0.25, 0)).write(run / "sft")
    (run / "sft" / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# mine/sft\n")
    reward_model = new_reward_model(
        ModelSource(str(run / "sft")), template="Q: {prompt}\nA:", lora=LoraSettings(rank=2)
    )
    for name, parameter in reward_model.model.named_parameters():
        if "lora_B" in name:  # an untrained adapter adds nothing
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    reward_model.mean, reward_model.std = 0.5, 2.0
    reward_model.bias.fill_(0.25)
    (run / "train-rm").mkdir()
    save_reward_model(reward_model, run / "train-rm")
    for stage in ("sft", "train-rm"):
        (run / stage / "manifest.json").write_text("{}")
    prompts = run.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {n}?"}) + "\n" for n in range(40)))
    recipe = {"name": "mine", "seed": 7, "model": {"path": str(tiny_llama)}, "data": {"prompts": str(prompts)}}
    ppo = {"steps": 10, "prompts_per_step": 8, "samples_per_prompt": 2, "minibatches": 4, "learning_rate": 3e-5}
    ppo |= {"kl_coef": 0.07, "gamma": 0.9, "gae_lambda": 0.8, "clip_range": 0.15, "length_penalty": 0.01}
    sections = {"sampling": {"temperature": 0.7, "max_new_tokens": 16}, "train_rm": {}, "ppo": ppo}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | sections | {"sft": {"data": str(prompts)}}))
    return run
