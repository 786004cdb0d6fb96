"""When `rlhf label` samples in the background, and how another command that samples is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_cli.cli import options
from rlhf_cli.cli.label.sampling import OtherCommand, background_sampling
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.recipe.document import RecipeText
from rlhf_cli.stages import registry

LABEL = {
    "people": "{by: human, model: m}",
    "people and items": "{by: human, items: given.jsonl}",
    "a random selection": "{by: human, model: m, active_learning: {by: random, prompts: 3}}",
    "a selection": "{by: human, model: m, active_learning: {by: uncertainty, prompts: 3, reward_models: [r]}}",
    "completions": "{by: human, model: m, active_learning: {by: random, prompts: 3, completions: 2}}",
    "a function": "{by: function, function: f.py:f, model: m}",
}


def given(tmp_path: Path, who: str = "people", **changed: object) -> dict[str, object]:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {{path: m}}\ndata: {{prompts: p.jsonl}}\nlabel: {LABEL[who]}\n")
    flags = {flag.name: None for flag in (*registry.stage("label").flags, *options.RUN_FLAGS)}
    own = {"settings": None, "run_dir": None, "processes": None, "accelerate_config": None, "dry_run": False}
    return {**flags, **own, "recipe": recipe, **changed}


def test_completions_for_people_are_sampled_in_the_background(tmp_path):
    assert background_sampling(given(tmp_path), ()) is not None
    assert background_sampling(given(tmp_path, processes=1), ()) is not None
    assert background_sampling(given(tmp_path, "a random selection"), ()) is not None


@pytest.mark.parametrize("who", ["people and items", "a selection", "completions", "a function"])
def test_what_is_not_sampled_for_people_one_by_one_is_not(tmp_path, who):
    assert background_sampling(given(tmp_path, who), ()) is None


@pytest.mark.parametrize(
    "changed",
    [{"processes": 2}, {"accelerate_config": Path("a.yaml")}, {"dry_run": True}, {"recipe": RecipeText("-", "")}],
    ids=str,
)
def test_commands_that_a_second_process_cannot_repeat_sample_first(tmp_path, changed):
    assert background_sampling(given(tmp_path, **changed), ()) is None


def test_a_command_that_samples_is_seen_by_the_lock_of_its_run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    assert not OtherCommand(run.path).is_running
    with run.lock():
        assert OtherCommand(run.path).is_running
    assert not OtherCommand(run.path).is_running
