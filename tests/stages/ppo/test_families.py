"""The `ppo` stage on encoder-decoders and with every kind of critic; what settings of precision and memory do."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from rlhf_cli.generation import policy_saving
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model.files import save_reward_model
from rlhf_cli.models.reward_model.loading import new_reward_model
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.ppo import run as ppo
from tests.stages.context import stage_context

TEXTS = ["What is bread?", "Why is the sky blue?", "The cat sat", "First heat the oven", "A short answer"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return file


@pytest.fixture
def function(tmp_path: Path) -> str:
    file = tmp_path / "reward.py"
    file.write_text("def score(prompts, completions):\n    return [float(len(c)) for c in completions]\n")
    return f"{file}:score"


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("name", "critic"), [("tiny_t5", "adapter"), ("tiny_bart", "separate")])
def test_an_encoder_decoder_trains_through_the_command(name, critic, request, prompts, function, tmp_path, rlhf):
    settings = ("ppo.steps=2", "ppo.prompts_per_step=4", "ppo.max_new_tokens=6", "ppo.epochs=2", "data.holdout=0",
                "ppo.learning_rate=1e-2", f"ppo.critic={critic}", "model.precision=float32")  # fmt: skip
    model = request.getfixturevalue(name)
    sets = [part for setting in settings for part in ("--set", setting)]
    result = rlhf("ppo", "--model", model, "--function", function, "--prompts", prompts, *sets)
    first, last = metrics_of(tmp_path / "runs/default/ppo")
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert first["val/first_epoch_ratio"] == pytest.approx(1.0, abs=1e-4)
    assert abs(last["objective/kl"]) > 1e-3
    base, trained = (AutoModelForSeq2SeqLM.from_pretrained(each) for each in (model, tmp_path / "runs/default/ppo"))
    assert any(not torch.equal(*pair) for pair in zip(base.parameters(), trained.parameters(), strict=True))
    assert "the critic starts from the policy and predicts 0" in result.stderr
    config = json.loads((tmp_path / "runs/default/ppo/critic/critic.json").read_text())
    assert config["kind"] == ("adapter" if critic == "adapter" else "full")


def run(folder: Path, model: Path, prompts: Path, *, inputs: dict | None = None, shared=None, **settings) -> Path:
    """The stage in folders of its own under `folder`; the artifact."""
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(model), "precision": "float32"} | (shared or {}),
            "data": {"holdout": 0.0, "prompts": str(prompts)},
            "ppo": {"steps": 1, "prompts_per_step": 4, "max_new_tokens": 4, "epochs": 1, "minibatches": 2} | settings,
        }
    )
    output, work = folder / "ppo", folder / "work"
    output.mkdir(parents=True)
    work.mkdir()
    given = {"policy": str(model), "prompts": str(prompts)} | (inputs or {})
    ppo.run(stage_context("ppo", recipe, output=output, work=work, **given))
    return output


@pytest.mark.parametrize("policy", ["lora", "none"])
def test_a_second_run_goes_on_with_the_critic_of_the_first(policy, tiny_llama, prompts, function, tmp_path, capsys):
    """Values of the second run's first step are those the first run ended with, in both forms."""
    rewards = {"rewards": [{"function": function}], "adapter": policy, "critic_learning_rate": 1e-2}
    first = run(tmp_path / "first", tiny_llama, prompts, **rewards)
    critic = {"critic": str(first / "critic")}
    second = run(tmp_path / "second", tiny_llama, prompts, inputs=critic, critic_warmup_steps=0, **rewards)
    assert f"the critic starts from {first / 'critic'}" in " ".join(capsys.readouterr().err.split())
    # A fresh critic predicts 0 at first; this one does not.
    assert metrics_of(first)[0]["val/explained_variance"] == pytest.approx(0.0, abs=1e-6)
    assert metrics_of(second)[0]["val/explained_variance"] != pytest.approx(0.0, abs=1e-6)
    assert load_file(second / "critic/value_head.safetensors")["weight"].any()


def test_a_lora_policy_beside_a_critic_that_is_the_reward_model_in_full(tiny_llama, prompts, tmp_path, capsys):
    reward = tmp_path / "rm"
    reward.mkdir()
    save_reward_model(new_reward_model(ModelSource(str(tiny_llama)), template=None, lora=None), reward)
    written = run(
        tmp_path / "run", tiny_llama, prompts, inputs={"reward_model": str(reward)}, critic="separate", adapter="lora"
    )
    said = " ".join(capsys.readouterr().err.split())
    assert "the critic is a separate model; the reward model is a separate model" in said
    assert "the critic starts from the reward model" in said
    assert {"config.json", "model.safetensors", "value_head.safetensors"} <= {
        path.name for path in (written / "critic").iterdir()
    }


@pytest.fixture
def products(monkeypatch):
    """(dtype, whether a gradient was wanted) of every linear layer's output in training, but for value heads."""
    seen: Counter[tuple[torch.dtype, bool]] = Counter()
    compare = policy_saving.completion_logits

    def unwatched(*arguments):
        before = seen.copy()
        logits = compare(*arguments)  # in float32 always
        seen.clear()
        seen.update(before)
        return logits

    monkeypatch.setattr(policy_saving, "completion_logits", unwatched)

    def watch(module: nn.Module, inputs: object, output: object) -> None:
        is_linear = isinstance(module, nn.Linear) and module.out_features > 1
        if (is_linear or isinstance(module, LoraLayer)) and isinstance(output, torch.Tensor):
            seen[output.dtype, torch.is_grad_enabled()] += 1

    handle = nn.modules.module.register_module_forward_hook(watch)
    yield seen
    handle.remove()


@pytest.mark.parametrize(("precision", "policy"), [("float32", "lora"), ("bfloat16", "lora"), ("bfloat16", "none")])
def test_products_are_in_bfloat16_where_the_precision_says_so(
    precision, policy, tiny_llama, prompts, function, products, tmp_path
):
    """Trap 3: of sampling, of the passes and of the update, while what trains is float32."""
    run(
        tmp_path, tiny_llama, prompts, shared={"precision": precision, "attention": "eager"}, adapter=policy,
        rewards=[{"function": function}],
    )  # fmt: skip
    asked = getattr(torch, precision)
    assert {dtype for dtype, _ in products} == {asked}
    assert {wanted for _, wanted in products} == {False, True}
    trained = load_file(tmp_path / "ppo/critic/value_head.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}


def test_all_weights_trained_in_bfloat16_start_at_no_kl_and_keep_float32(tiny_llama, prompts, function, tmp_path):
    """Trap 3: the reference is rounded as the policy is, and a step far below what bfloat16 resolves is not lost."""
    written = run(
        tmp_path, tiny_llama, prompts, shared={"precision": "bfloat16"}, adapter="none", learning_rate=1e-6,
        rewards=[{"function": function}],
    )  # fmt: skip
    first = metrics_of(written)[0]
    assert first["objective/kl"] == 0.0
    assert first["val/first_epoch_ratio"] == pytest.approx(1.0, abs=1e-3)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_llama, written))
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].dtype == torch.float32
    step = (after[name] - before[name]).abs()
    assert 1e-8 < step.max() < 1e-5
    assert (step > 0).float().mean() > 0.9


@pytest.mark.parametrize("settings", [{"adapter": "lora", "critic": "separate"}, {"adapter": "none"}])
def test_gradient_checkpointing_computes_each_layer_of_an_update_twice(
    settings, tiny_llama, prompts, function, products, tmp_path
):
    """Trap 3: the setting reaches the models, and weights end the same."""
    counts, ends = [], []
    for recompute in (False, True):
        products.clear()
        folder = tmp_path / str(recompute)
        run(
            folder, tiny_llama, prompts, rewards=[{"function": function}], gradient_checkpointing=recompute,
            **settings,
        )  # fmt: skip
        counts.append(products[torch.float32, True])
        ends.append(load_file(folder / "ppo/model.safetensors"))
    # All but each layer's last product, which no gradient asks for.
    assert 1.7 * counts[0] < counts[1] <= 2 * counts[0]
    for name, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][name])
