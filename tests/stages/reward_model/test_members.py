"""`train_rm.members` and `train_rm.data_curve`: several reward models in one stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_cli.errors import UsageError
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model.loading import load_reward_model
from rlhf_cli.models.reward_model.members import further_members, member_folder
from rlhf_cli.recipe.loader import load_recipe
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.inputs import InputFinder
from rlhf_cli.stages.ppo.inputs import find_inputs
from rlhf_cli.stages.ppo.rewards import build_rewards
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.stages.reward_model import run as train_rm
from rlhf_cli.stages.reward_model.run import mean_rewards, on_scale
from tests.stages.reward_model.test_stage import context_of, write_rankings

FEW = {"epochs": 2.0, "checkpoint_steps": 1, "normalize": False}


def run_in(folder: Path, model: Path, **settings):
    folder.mkdir()
    context = context_of(folder, model, write_rankings(folder / "r.jsonl"), **(FEW | settings))
    return context, train_rm.run(context)


def heads(output: Path, members: int) -> list[torch.Tensor]:
    files = [member_folder(output, number) / "head.safetensors" for number in range(1, members + 1)]
    return [next(value for name, value in load_file(file).items() if "weight" in name) for file in files]


def test_members_are_written_beside_the_first_which_is_that_of_a_single_run(tiny_llama, tmp_path):
    alone, _ = run_in(tmp_path / "alone", tiny_llama)
    together, outcome = run_in(tmp_path / "together", tiny_llama, members=3)
    assert [path.name for path in further_members(together.output)] == ["2", "3"]
    first, second, third = heads(together.output, 3)
    assert torch.equal(first, heads(alone.output, 1)[0])
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    for folder in further_members(together.output):
        assert (folder / "metrics.jsonl").is_file()
    quality = json.loads((together.output / "quality.json").read_text())
    assert len(quality["members"]) == 3
    assert quality["disagreement"]["value"] == outcome.metrics["rm/disagreement"]


def test_reported_figures_are_of_the_mean_of_the_members_rewards(tiny_llama, tmp_path):
    context, outcome = run_in(tmp_path / "run", tiny_llama, members=2, epochs=1.0, learning_rate=1e-3)
    members = [load_reward_model(ModelSource(str(member_folder(context.output, n))), template=None) for n in (1, 2)]
    from rlhf_cli.data.sources import read_records
    from rlhf_cli.data.splits import Split
    from rlhf_cli.stages.reward_model.evaluation import accuracy, ranking_report

    held_out = [one for one in read_records(str(tmp_path / "run/r.jsonl"), "ranking").records
                if Split(0.3, 0).holds_out(one.prompt)]  # fmt: skip
    rewards = [
        [member.score([one.prompt] * len(one.completions), one.completions) for one in held_out] for member in members
    ]
    assert outcome.metrics["rm/accuracy"] == pytest.approx(accuracy(held_out, mean_rewards(rewards)))
    quality = json.loads((context.output / "quality.json").read_text())
    found = [one["accuracy"]["value"] for one in quality["members"]]
    assert found == pytest.approx([ranking_report(held_out, own).accuracy.value for own in rewards])


def test_the_mean_of_rewards_by_hand():
    assert mean_rewards([[[1.0, 2.0], [3.0]], [[3.0, 0.0], [5.0]]]) == [[2.0, 1.0], [4.0]]


@pytest.mark.parametrize("killed_at", ["member 2", "data"])
def test_killed_in_a_later_training_and_resumed_equals_uninterrupted(killed_at, tiny_llama, tmp_path, monkeypatch):
    settings = {"members": 2, "data_curve": [0.5]}
    whole, _ = run_in(tmp_path / "whole", tiny_llama, **settings)
    from rlhf_cli.stages.reward_model.trainer import RewardTrainer

    real, trainings = RewardTrainer.step, []

    def step(self, number, watch=None):
        if number == 0:
            trainings.append(self)
        if len(trainings) == {"member 2": 2, "data": 3}[killed_at] and number == 1:
            raise KeyboardInterrupt
        return real(self, number, watch)

    monkeypatch.setattr(RewardTrainer, "step", step)
    folder = tmp_path / "killed"
    folder.mkdir()
    context = context_of(folder, tiny_llama, write_rankings(folder / "r.jsonl"), **(FEW | settings))
    with pytest.raises(KeyboardInterrupt):
        train_rm.run(context)
    monkeypatch.setattr(RewardTrainer, "step", real)
    shutil.rmtree(context.output)
    context.output.mkdir()
    train_rm.run(context)
    assert all(map(torch.equal, heads(whole.output, 2), heads(context.output, 2)))
    for name in ("quality.json", "metrics.jsonl", "members/2/metrics.jsonl"):
        assert (whole.output / name).read_bytes() == (context.output / name).read_bytes()


def test_ppo_combines_all_members(tiny_llama, tmp_path):
    context, _ = run_in(tmp_path / "run", tiny_llama, members=2, epochs=1.0)
    first, second = (
        load_reward_model(ModelSource(str(member_folder(context.output, n))), template=None) for n in (1, 2)
    )

    class Handle:
        model = first
        score = staticmethod(first.score)

    settings = PPOSettings(reward_combination="min")
    members = further_members(context.output)
    reward = build_rewards(settings, Handle(), ModelSource(str(tiny_llama)), None, members=members)  # pyright: ignore
    assert reward.described() == "the min of reward-model and reward-model-2"
    prompts, completions = ["Question 40 about bread?"] * 2, ["water bread", "bread"]
    expected = [
        min(pair) for pair in zip(first.score(prompts, completions), second.score(prompts, completions), strict=True)
    ]
    assert reward.score(prompts, completions).total == pytest.approx(expected)


class Artifacts:
    def __init__(self, folder: Path) -> None:
        self.run_dir = folder

    def folder(self, stage: str) -> Path:
        return self.run_dir / stage

    def has(self, stage: str) -> bool:
        return True

    def writes(self, stage: str) -> str:
        return stage


@pytest.mark.parametrize(
    ("combination", "members", "message"),
    [
        ("sum", 1, None),
        ("mean", 2, None),
        ("sum", 2, "would add their rewards"),
        ("min", 1, "has no effect without `ppo.rewards` or an ensemble"),
    ],
)
def test_a_combination_that_adds_members_or_does_nothing_is_refused(combination, members, message, tmp_path):
    text = f"model: {{path: m}}\ntrain_rm: {{members: {members}}}\nppo: {{reward_combination: {combination}}}\n"
    (tmp_path / "r.yaml").write_text(text)
    if message is None:
        load_recipe(tmp_path / "r.yaml", [], [])
    else:
        with pytest.raises(UsageError, match=message):
            load_recipe(tmp_path / "r.yaml", [], [])
    # An artifact of an earlier run, or a folder that the recipe names.
    for number in range(2, members + 1):
        member_folder(tmp_path / "train-rm", number).mkdir(parents=True)
    (tmp_path / "train-rm").mkdir(exist_ok=True)
    for named in ({}, {"reward_model": str(tmp_path / "train-rm")}):
        section = {"reward_combination": combination, "prompts": "p.jsonl"} | named
        recipe = Recipe.model_validate({"model": {"path": "m"}, "ppo": section})
        finder = InputFinder("ppo", recipe, Artifacts(tmp_path))
        if message is None:
            assert find_inputs(recipe.section("ppo"), recipe, finder).reward_model is not None  # pyright: ignore
        else:
            with pytest.raises(UsageError, match=message):
                find_inputs(recipe.section("ppo"), recipe, finder)  # pyright: ignore


def test_a_data_curve_measures_models_on_shares_of_the_prompts_and_keeps_none(tiny_llama, tmp_path):
    context, outcome = run_in(tmp_path / "run", tiny_llama, data_curve=[0.5, 0.1])
    curve = json.loads((context.output / "quality.json").read_text())["data_curve"]
    assert [one["share"] for one in curve] == [0.1, 0.5, 1.0]
    whole = curve[2]["rankings"]
    assert [one["rankings"] for one in curve[:2]] == [round(0.1 * whole), round(0.5 * whole)]
    assert curve[1]["accuracy"]["value"] == outcome.metrics["rm/accuracy_data_0.5"]
    assert curve[2]["accuracy"]["value"] == outcome.metrics["rm/accuracy"]
    assert not list(context.output.glob("data-*"))


def test_a_member_with_a_larger_spread_counts_no_more():
    """Normalized rewards are 1, -1 and -2, 1: their mean prefers the second completion; raw ones the first."""
    small, large = [[2.0, -1.0]], [[30.0, -30.0]]
    assert on_scale(small, (0.5, 1.5), (0.0, 1.0)) == [[1.0, -1.0]]
    first, second = on_scale(small, (0.5, 1.5), (10.0, 2.0)), on_scale(large, (70.0, 20.0), (10.0, 2.0))
    assert first == [[12.0, 8.0]]
    assert second == [[6.0, 0.0]]
    assert mean_rewards([first, second]) == [[9.0, 4.0]]
