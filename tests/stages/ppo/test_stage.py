"""The `ppo` stage: what it writes, and that every kind of reward trains through the real command without a recipe."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from rlhf_cli.data.examples import Example
from rlhf_cli.data.splits import Split
from rlhf_cli.generation.contract import Contract, read_contract
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import new_reward_model
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.shared import LoraSettings, SamplingSettings
from rlhf_cli.stages.common import warn_of_rounding
from rlhf_cli.stages.ppo.model_loading import load_ppo_models
from rlhf_cli.stages.ppo.model_saving import save_ppo_models
from rlhf_cli.stages.ppo.settings import PPOSettings
from tests.stages.context import stage_context

SHORT = ("--set", "ppo.steps=2", "--set", "ppo.prompts_per_step=4", "--set", "ppo.max_new_tokens=6",
         "--set", "ppo.epochs=1", "--set", "data.holdout=0", "--set", "model.precision=float32")  # fmt: skip


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    texts = ["What is bread?", "Why is the sky blue?", "The cat sat", "First heat the oven", "A short answer"]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return file


@pytest.fixture
def length_reward(tmp_path: Path) -> str:
    file = tmp_path / "reward.py"
    file.write_text("def score(prompts, completions):\n    return [float(len(c)) for c in completions]\n")
    return f"{file}:score"


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_the_saved_policy_is_the_trained_one(adapter, tiny_gpt2, tmp_path):
    source = ModelSource(str(tiny_gpt2))
    shape = {"lora": {"rank": 4, "alpha": 8.0}} if adapter == "lora" else {}
    settings = PPOSettings.model_validate({"adapter": adapter} | shape)
    models = load_ppo_models(source, settings, reward_path=None, template=None).models
    with torch.no_grad():
        for parameter in models.policy_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.tensor([[5, 6, 7, 8]])
    with models.policy() as model, torch.no_grad():
        trained = model(input_ids=ids).logits
    with models.reference() as model, torch.no_grad():
        reference = model(input_ids=ids).logits
    probe = [Example([5, 6], [7, 8])]
    assert save_ppo_models(models, source, settings, tmp_path, probe=probe, sampling=Sampling(), stop_ids=[2, 5]) < 1e-9
    saved = load_policy(ModelSource(str(tmp_path)))(input_ids=ids).logits
    torch.testing.assert_close(saved, trained, atol=1e-5, rtol=1e-4)
    assert (saved - reference).abs().max() > 1e-2
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "critic"} <= names
    assert not [path for path in tmp_path.rglob("*") if path.suffix in {".bin", ".pt", ".pkl", ".pth"}]


def test_later_stages_end_completions_with_the_stop_tokens_of_ppo(tiny_llama, prompts, length_reward, tmp_path, rlhf):
    untrained = Policy.load(ModelSource(str(tiny_llama)), Sampling())
    stop = next(id for id in range(40, 60) if id not in untrained.stop_ids)
    chosen = json.dumps(untrained.format.tokenizer.convert_ids_to_tokens([stop]))
    rewards = json.dumps([{"function": length_reward}])
    rlhf("ppo", "--model", tiny_llama, "--prompts", prompts, "--set", f"ppo.rewards={rewards}", *SHORT,
         "--set", f"ppo.stop_tokens={chosen}")  # fmt: skip
    folder = tmp_path / "runs/default/ppo"
    contract = read_contract(folder)
    assert contract is not None
    trained = Policy.load(ModelSource(str(folder)), Sampling.resolve(contract.sampling))
    assert trained.stop_ids == untrained.stop_ids | {stop}
    saved = json.loads((folder / "generation_config.json").read_text())
    assert set(saved["eos_token_id"]) == trained.stop_ids, "for other programs"


def test_ppo_with_model_reward_model_and_prompts_needs_no_recipe(tiny_llama, prompts, tmp_path, rlhf):
    reward = tmp_path / "rm"
    reward.mkdir()
    save_reward_model(
        new_reward_model(ModelSource(str(tiny_llama)), template=None, lora=LoraSettings(rank=4, alpha=8.0)), reward
    )
    result = rlhf("ppo", "--model", tiny_llama, "--reward-model", reward, "--prompts", prompts, *SHORT)
    folder = Path(result.stdout.strip())
    assert (tmp_path / folder).resolve() == tmp_path / "runs/default/ppo"
    first, last = metrics_of(tmp_path / "runs/default/ppo")
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert last["episode"] == 8.0
    assert "the reward model is an adapter on it too" in result.stderr
    assert "Warning" not in result.stderr


def test_ppo_with_a_function_alone(tiny_t5, prompts, length_reward, tmp_path, rlhf):
    functions = json.dumps([{"function": length_reward, "weight": 2.0}])
    rlhf("ppo", "--model", tiny_t5, "--prompts", prompts, "--set", f"ppo.rewards={functions}", *SHORT)
    assert metrics_of(tmp_path / "runs/default/ppo")[0]["objective/scores"] > 1.0


def test_ppo_with_a_reward_model_of_another_kind(tiny_llama, tiny_bert, prompts, tmp_path, rlhf):
    reward = tmp_path / "rm"
    reward.mkdir()
    save_reward_model(new_reward_model(ModelSource(str(tiny_bert)), template=None, lora=None), reward)
    result = rlhf(
        "ppo",
        "--model",
        tiny_llama,
        "--reward-model",
        reward,
        "--prompts",
        prompts,
        "--set",
        "ppo.adapter=none",
        *SHORT,
    )
    assert len(metrics_of(tmp_path / "runs/default/ppo")) == 2
    assert "separate models" in result.stderr


def test_ppo_without_any_reward_says_what_to_do(tiny_llama, prompts, rlhf):
    result = rlhf("ppo", "--model", tiny_llama, "--prompts", prompts, *SHORT, code=2)
    assert "reward" in result.stderr
    assert "hint:" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_that_could_learn_nothing_is_no_success(tiny_llama, prompts, tmp_path, rlhf):
    file = tmp_path / "bad.py"
    file.write_text("def score(prompts, completions):\n    return [float('nan')] * len(completions)\n")
    functions = json.dumps([{"function": f"{file}:score"}])
    rewards = ("--set", f"ppo.rewards={functions}")
    result = rlhf("ppo", "--model", tiny_llama, "--prompts", prompts, *rewards, *SHORT, code=70)
    assert "bad.py:score" in result.stderr
    assert "nothing was learned in any step" in result.stderr
    assert not (tmp_path / "runs/default/ppo").exists()


def test_weights_of_a_training_in_full_that_are_rounded_are_said(tiny_llama, tmp_path, capsys):
    folder = tmp_path / "sft"
    shutil.copytree(tiny_llama, folder)
    Contract(None, {}, SamplingSettings(), Split(0.1, 0)).write(folder)

    def warned(path: Path, **section: str) -> bool:
        recipe = Recipe.model_validate({"ppo": section})
        context = stage_context("ppo", recipe, output=tmp_path, work=tmp_path, policy=path, prompts=tmp_path)
        warn_of_rounding(context, ModelSource(str(path), dtype=torch.bfloat16))
        return "`--set model.dtype=float32` keeps them" in capsys.readouterr().err

    assert warned(folder)
    assert not warned(folder, adapter="none"), "trained in float32"
    assert not warned(tiny_llama), "a third-party model, in the precision that the recipe says"
