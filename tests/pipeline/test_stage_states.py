"""What `watch`, `diagnose` and `report` say of a run that is not complete, or no longer of one piece."""

from __future__ import annotations

import shutil

import pytest

from rlhf_cli.pipeline.diagnosis import diagnose
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.pipeline.stage_states import planned_stages, states_of
from rlhf_cli.report.gather import read_run
from rlhf_cli.report.verdict import verdict
from rlhf_cli.watch.state import read_live

ALL = ["sft", "label", "train-rm", "ppo", "evaluate"]


def states(toy, **running) -> dict[str, str]:
    found = states_of(RunDirectory(toy.run_dir), **({"is_running": False} | running))
    return {stage: one.state for stage, one in found.items()}


def test_a_complete_run(finished):
    assert states(finished) == dict.fromkeys(ALL, "finished")
    live = read_live(finished.run_dir)
    assert live.is_finished
    assert live.results == [("score", "0.50")]
    assert diagnose(finished.run_dir).as_json()["is_complete"]


def test_a_run_that_ended_between_stages_is_not_complete(finished):
    for stage in ("ppo", "evaluate"):
        shutil.rmtree(finished.run_dir / stage)
    live = read_live(finished.run_dir)
    assert live.summary == "sft finished, label finished, train-rm finished, ppo to come, evaluate to come"
    assert not live.is_finished
    assert live.results == ()
    assert diagnose(finished.run_dir).unfinished == ["ppo", "evaluate"]
    assert "not complete: ppo, evaluate" in finished.rlhf("diagnose", "runs/toy").stdout
    said = verdict(read_run(finished.run_dir)).reason
    assert said == (
        f"Finished so far: sft, label, train-rm. Still to run: ppo, evaluate; `rlhf run {finished.run_dir}/recipe.yaml "
        f"--run-dir {finished.run_dir}` continues."
    )


def test_that_command_continues(finished):
    shutil.rmtree(finished.run_dir / "evaluate")
    done = finished.rlhf("run", "runs/toy/recipe.yaml", "--run-dir", "runs/toy", "--json")
    assert done.statuses == dict.fromkeys(ALL[:-1], "cached") | {"evaluate": "done"}


def test_what_was_made_from_an_earlier_artifact_is_outdated(finished):
    finished.rlhf("ppo", "recipe.yaml", "--set", "ppo.steps=4")
    assert states(finished) == dict.fromkeys(ALL[:-1], "finished") | {"evaluate": "outdated"}
    live = read_live(finished.run_dir)
    assert (live.is_finished, live.results) == (False, ())
    assert "evaluate: finished, but made from an outdated output" in finished.rlhf("diagnose", "runs/toy").stdout
    finished.run("--set", "ppo.steps=4")
    assert states(finished) == dict.fromkeys(ALL, "finished")


def test_what_comes_after_a_stage_that_runs_again_is_outdated(finished):
    assert states(finished, is_running=True, running="train-rm") == {
        "sft": "finished", "label": "finished", "train-rm": "running", "ppo": "outdated", "evaluate": "outdated",
    }  # fmt: skip
    run = RunDirectory(finished.run_dir)
    run.begin("train-rm", {}, resume=False)  # `diagnose` does not know which stage a process works on
    assert states(finished, is_running=True)["train-rm"] == "running"
    assert states(finished)["train-rm"] == "finished", "an attempt that left nothing is as none"


@pytest.mark.slow
def test_a_stage_that_was_killed_while_it_ran_again(finished):
    finished.rlhf("ppo", "recipe.yaml", "--set", "ppo.steps=4", FAKE_DIE="ppo")
    assert states(finished) == dict.fromkeys(ALL[:-2], "finished") | {"ppo": "killed", "evaluate": "outdated"}


def test_an_artifact_that_was_removed_to_save_space_makes_nothing_outdated(finished):
    shutil.rmtree(finished.run_dir / "sft")
    assert states(finished) == {"sft": "to come"} | dict.fromkeys(ALL[1:], "finished")


def test_stages_that_ran_alone_plan_nothing(toy):
    done = toy.rlhf("sft", "--model", "base", "--data", "demos.jsonl", "--run-dir", "runs/toy")
    assert done.code == 0, done.stderr
    assert planned_stages(toy.run_dir) == []
    assert states(toy) == {"sft": "finished"}
