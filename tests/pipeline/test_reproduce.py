"""What a run records of itself, and running it again from that."""

from __future__ import annotations

import json

import pytest

from rlhf_cli.pipeline import reproduce
from rlhf_cli.pipeline.manifest import versions
from rlhf_cli.pipeline.record import COMMAND, ENVIRONMENT, RECIPE, recipe_of


def test_a_run_records_recipe_commands_and_environment(toy):
    assert toy.run("--set", "ppo.steps=4").code == 0
    recipe = (toy.run_dir / RECIPE).read_text()
    assert "steps: 4" in recipe
    assert "--set ppo.steps=4" in recipe, "the origin of the value"
    assert f"data: {toy.folder}/demos.jsonl" in recipe, "paths are absolute"
    assert f"function: {toy.folder}/gold.py:score" in recipe
    toy.run()
    first, second = (toy.run_dir / COMMAND).read_text().splitlines()
    assert "rlhf run recipe.yaml --json --set ppo.steps=4" in first
    assert second.endswith("rlhf run recipe.yaml --json")
    environment = json.loads((toy.run_dir / ENVIRONMENT).read_text())
    assert "torch" in environment["versions"]


def absolute(toy) -> list[str]:
    functions = ("label.function", "evaluate.judge_function")
    return [part for name in functions for part in ("--set", f"{name}={toy.folder}/gold.py:score")]


def test_the_command_of_a_stage_records_that_stage_alone(toy):
    toy.run("--set", "ppo.steps=4")
    toy.rlhf("ppo", "recipe.yaml", "--run-dir", "runs/toy", "--set", "ppo.steps=7")
    assert "steps: 4" in (toy.run_dir / RECIPE).read_text()
    assert "steps: 7" in recipe_of(toy.run_dir, "ppo").read_text()
    assert "steps: 4" in recipe_of(toy.run_dir, "sft").read_text()


def test_a_directory_made_stage_by_stage_is_reproduced(toy):
    own = ("--run-dir", "runs/own", "--set", f"model.path={toy.folder}/base")
    assert toy.rlhf("sft", "--data", f"{toy.folder}/demos.jsonl", *own).code == 0
    prompts = ("--set", f"data.prompts={toy.folder}/prompts.jsonl")
    assert toy.rlhf("label", "--by", "function", "--function", f"{toy.folder}/gold.py:score", *prompts, *own).code == 0
    outcome = toy.rlhf("reproduce", "runs/own")
    assert outcome.code == 0, outcome.stderr
    assert [line.split()[:2] for line in outcome.stdout.splitlines()] == [["sft", "equal"], ["label", "equal"]]


def test_a_dry_run_records_nothing(toy):
    assert toy.run("--dry-run").code == 0
    assert not toy.run_dir.exists()


def test_a_run_is_reproduced_from_its_record(toy, tmp_path):
    """The fake stages write the paths of their data; those that are recorded are absolute."""
    toy.rlhf("run", "recipe.yaml", "--set", f"sft.data={toy.folder}/demos.jsonl", *absolute(toy))
    toy.ran()
    outcome = toy.rlhf("reproduce", "runs/toy", "--json")
    assert outcome.code == 0, outcome.stderr
    assert [row["equal"] for row in outcome.json.values()] == [True] * 5
    assert (toy.folder / "runs" / "toy-again" / "ppo").is_dir()
    assert len(toy.ran()) == 5
    assert toy.rlhf("reproduce", "runs/toy").code == 0
    assert toy.ran() == [], "it is finished"


def test_a_hash_that_differs_is_named_and_fails(toy):
    toy.run()
    toy.write("demos.jsonl", '{"prompt": "other", "completion": "text"}\n')
    outcome = toy.rlhf("reproduce", "runs/toy")
    assert outcome.code == 1
    assert "stages differ, the first is `sft`" in outcome.stderr
    assert "sft        DIFFERS" in outcome.stdout


@pytest.mark.parametrize("torch", [None, "1.0"])
def test_versions_that_have_changed_since_a_stage_ran_are_named(toy, monkeypatch, torch):
    toy.run()
    if torch is not None:
        monkeypatch.setattr(reproduce, "versions", lambda: versions() | {"torch": torch})
    said = toy.rlhf("reproduce", "runs/toy").stderr
    assert (f"versions have changed since: torch {versions()['torch']} -> 1.0;" in said) == (torch is not None)
    assert ("versions have changed" in said) == (torch is not None)


def test_labels_and_replies_of_judges_are_not_asked_for_again(toy):
    toy.run()
    for stage in ("label", "evaluate"):
        toy.write(f"runs/toy/kept/{stage}/replies.jsonl", stage)
    said = toy.rlhf("reproduce", "runs/toy").stderr
    assert said.count("labels and replies of judges are copied") == 2
    kept = toy.folder / "runs" / "toy-again" / "kept"
    assert [(kept / stage / "replies.jsonl").read_text() for stage in ("label", "evaluate")] == ["label", "evaluate"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("runs/toy", "--run-dir", "runs/toy"), "is the run itself"),
        (("elsewhere",), "no stage is finished"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(toy, arguments, said):
    toy.run()
    outcome = toy.rlhf("reproduce", *arguments)
    assert outcome.code == 2
    assert said in outcome.stderr


def test_the_report_is_written_at_the_end_of_a_run(toy):
    outcome = toy.run()
    assert f"report: {toy.run_dir.relative_to(toy.folder)}/report.html" in outcome.stderr
    assert "talk to it: rlhf chat runs/toy" in outcome.stderr
    assert (toy.run_dir / "report.html").is_file()
