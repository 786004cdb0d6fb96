"""What becomes of a finished result: it is continued with more steps, or replaced, which is said or refused."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.pipeline.toy import Toy

CONSTANT = ("--set", "ppo.schedule=constant")


@pytest.fixture
def trained(toy: Toy) -> Toy:
    """The run up to a finished PPO with 3 steps at a constant rate."""
    outcome = toy.run("--to", "ppo", *CONSTANT)
    assert outcome.code == 0, outcome.stderr
    assert "ppo: its last checkpoint is kept: a larger `ppo.steps` continues from there" in outcome.stderr
    toy.ran()
    return toy


def more(toy: Toy, steps: int, *arguments: str, **environment: str):
    return toy.run("--to", "ppo", *CONSTANT, "--set", f"ppo.steps={steps}", *arguments, **environment)


def test_more_steps_continue_a_finished_run(trained):
    planned = more(trained, 5, "--dry-run")
    assert planned.statuses["ppo"] == "would resume"
    outcome = more(trained, 5)
    assert outcome.code == 0, outcome.stderr
    assert "ppo: resuming (`ppo.steps` was 3, now 5)" in outcome.stderr
    assert trained.ran() == ["ppo step 3"]
    assert more(trained, 5).statuses["ppo"] == "cached"
    more(trained, 6)
    assert trained.ran() == ["ppo step 3"], "the longer run can be continued too"


@pytest.mark.slow
def test_a_kill_while_steps_are_added_keeps_both(trained):
    assert more(trained, 5, FAKE_DIE="ppo").code < 0
    trained.ran()
    assert more(trained, 3).statuses["ppo"] == "cached"
    assert more(trained, 7).code == 0, "steps of an unfinished run can be raised too"
    assert trained.ran() == ["ppo step 3"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param(
            ("--set", "ppo.schedule=cosine"), "with `ppo.schedule: cosine` the learning rates of all steps", id="cosine"
        ),
        pytest.param(
            (*CONSTANT, "--set", "ppo.warmup_share=0.1"), "with `ppo.warmup_share: 0.1` the learning", id="warmup"
        ),
    ],
)
def test_where_rates_depend_on_the_steps_it_starts_over_and_says_why(toy, changes, said):
    first = toy.run("--to", "ppo", *changes)
    assert "last checkpoint is kept" not in first.stderr
    toy.ran()
    outcome = toy.run("--to", "ppo", *changes, "--set", "ppo.steps=5")
    assert "ppo: starting (`ppo.steps` was 3, now 5; from the first step, because " in outcome.stderr
    assert said in outcome.stderr
    assert toy.ran() == ["ppo nothing"]


@pytest.fixture
def begun(toy: Toy) -> Toy:
    """A run whose PPO failed after step 5 of 40, at a constant rate."""
    assert more(toy, 40, FAKE_RAISE="ppo:diverged").code != 0
    checkpoint = toy.run_dir / ".ppo.work" / "step-00000005"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text("{}")
    toy.ran()
    return toy


@pytest.mark.parametrize("steps", [6, 12, 41])
def test_an_unfinished_run_continues_with_fewer_or_more_steps(begun, steps):
    assert more(begun, steps, "--dry-run").statuses["ppo"] == "would resume"
    outcome = more(begun, steps)
    assert outcome.code == 0, outcome.stderr
    assert f"ppo: resuming (`ppo.steps` was 40, now {steps})" in outcome.stderr
    assert begun.ran() == ["ppo step 3"]
    assert more(begun, steps).statuses["ppo"] == "cached", "it is the artifact of that number of steps"


def test_an_unfinished_run_that_is_as_long_as_asked_finishes_with_what_it_has(begun):
    outcome = more(begun, 5)
    assert outcome.code == 0, outcome.stderr
    said = "resuming (`ppo.steps` was 40, now 5; all of them are done, so that it finishes with what it has)"
    assert said in outcome.stderr


def test_steps_below_those_done_are_refused_and_the_hint_works(begun):
    refused = more(begun, 4)
    assert refused.code == 2
    assert "has an unfinished `ppo` with 5 steps done: `ppo.steps` was 40, now 4" in refused.stderr
    assert "hint: finish with those by `--set ppo.steps=5`, or discard the unfinished work with `--force ppo`" in (
        " ".join(refused.stderr.split())
    )
    assert more(begun, 4, "--set", "ppo.steps=5").code == 0
    assert begun.ran() == ["ppo step 3"]


@pytest.mark.parametrize("name", ["ppo.kl_coef=0.1", "ppo.clip_range=0.1"])
def test_fewer_steps_and_another_change_are_refused(begun, name):
    refused = more(begun, 12, "--set", name)
    assert refused.code == 2
    assert "that was started differently: " in refused.stderr
    assert "`ppo.steps` was 40, now 12" in refused.stderr


@pytest.mark.parametrize(
    ("stage", "changes", "said"),
    [
        pytest.param(
            "ppo",
            "ppo.steps=2",
            "with `ppo.schedule: linear` the learning rates of all steps depend on `ppo.steps`",
            id="linear",
        ),
        pytest.param(
            "sft",
            "sft.epochs=0.5",
            "with `sft.schedule: linear` the learning rates of all steps depend on `sft.epochs`",
            id="sft",
        ),
        pytest.param(
            "train-rm",
            "train_rm.epochs=0.5",
            "with `train_rm.schedule: linear` the learning rates of all steps depend on `train_rm.epochs`",
            id="train-rm",
        ),
    ],
)
def test_where_rates_depend_on_the_steps_fewer_are_refused_with_the_reason(toy, stage, changes, said):
    assert toy.run("--to", stage, FAKE_RAISE=f"{stage}:diverged").code != 0
    refused = toy.run("--to", stage, "--set", changes)
    assert refused.code == 2
    assert said in " ".join(refused.stderr.split())
    setting, _, _ = changes.partition("=")
    (kept,) = re.findall(rf"hint: resume by `--set ({setting}=\S+)`, or discard", refused.stderr)
    assert toy.run("--to", stage, "--set", changes, "--set", kept).code == 0


def test_epochs_of_an_unfinished_stage_stay_at_a_constant_rate_too(toy):
    constant = ("--to", "sft", "--set", "sft.schedule=constant", "--set", "sft.warmup_share=0")
    assert toy.run(*constant, FAKE_RAISE="sft:diverged").code != 0
    refused = toy.run(*constant, "--set", "sft.epochs=2")
    assert refused.code == 2
    assert "`sft.epochs` decides which records are in the last step" in " ".join(refused.stderr.split())


@pytest.mark.parametrize("changes", [("--set", "ppo.kl_coef=0.1"), ("--seed", "3")], ids=["setting", "seed"])
def test_other_changes_start_over(trained, changes):
    more(trained, 5, *changes)
    assert trained.ran()[-1] == "ppo nothing"
    more(trained, 6, *changes)
    assert trained.ran() == ["ppo step 3"], "the checkpoint is that of the new result"


def test_a_checkpoint_of_another_result_is_not_used(trained):
    kept = trained.run_dir / ".ppo.last"
    stolen = trained.folder / "stolen"
    shutil.copytree(kept, stolen)
    more(trained, 3, "--set", "ppo.kl_coef=0.1")
    shutil.rmtree(kept)
    stolen.rename(kept)
    trained.ran()
    outcome = more(trained, 5, "--set", "ppo.kl_coef=0.1")
    assert "from the first step, because its last checkpoint was not kept" in outcome.stderr
    assert trained.ran() == ["ppo nothing"]


def test_fewer_steps_start_over(trained):
    more(trained, 2)
    assert trained.ran() == ["ppo nothing"]


SFT = ("sft", "--model", "base", "--data", "demos.jsonl")
OTHER = ("--set", "sft.epochs=2")


def test_a_result_in_the_default_folder_is_not_replaced_unasked(toy):
    assert toy.rlhf(*SFT).code == 0
    toy.ran()
    for arguments in ((*SFT, *OTHER), (*SFT, *OTHER, "--dry-run")):
        refused = toy.rlhf(*arguments)
        assert refused.code == 2
        assert "runs/default has a finished `sft` that was made differently: `sft.epochs` was" in refused.stderr
        assert "hint: `--run-dir runs/NAME` keeps both; `--run-dir runs/default` replaces it" in refused.stderr
    assert toy.ran() == []
    assert toy.rlhf(*SFT, *OTHER, "--run-dir", "runs/other").code == 0
    replaced = toy.rlhf(*SFT, *OTHER, "--run-dir", "runs/default")
    assert (
        "sft: its finished result is replaced when the new one is done; another --run-dir keeps both" in replaced.stderr
    )
    assert toy.rlhf(*SFT, "--force").code == 0
    assert toy.ran() == ["sft nothing"] * 3


def test_a_recipe_without_a_name_is_not_replaced_by_another(toy):
    recipe = (toy.folder / "recipe.yaml").read_text().replace("name: toy\n", "")
    toy.write("recipe.yaml", recipe)
    assert toy.run("--to", "label").code == 0
    assert toy.run("--to", "label").code == 0
    toy.write("recipe.yaml", recipe.replace("  function:", "  completions_per_prompt: 2\n  function:"))
    refused = toy.run("--to", "label")
    assert refused.code == 2
    assert "runs/default has a finished `label` that was made differently" in refused.stderr


def test_a_run_with_a_name_says_what_it_replaces(finished):
    outcome = finished.run("--set", "train_rm.epochs=2")
    assert outcome.code == 0
    assert "train-rm: its finished result is replaced when the new one is done" in outcome.stderr
    assert "sft: its finished result" not in outcome.stderr
