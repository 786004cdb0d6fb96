"""Inputs of stages and the errors for missing ones, before any stage runs."""

from __future__ import annotations

import json

import pytest

MISSING_REWARD = """\
error: no reward model in runs/toy: `ppo` reads the output of `train-rm`

hint: run `rlhf train-rm` with `--run-dir runs/toy` first, or specify one with `--set ppo.reward_model=PATH`, \
or use another reward with `--function` or `--reward-url`
"""


def test_missing_reward_model_message(toy):
    outcome = toy.run("--set", "train_rm=null")
    assert outcome.code == 2
    assert outcome.stderr == MISSING_REWARD
    assert toy.ran() == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.path=null"], "no base model: `sft` needs `model.path` or `model.build`"),
        (["data.prompts=null"], "no prompts: `label` needs `label.prompts` or `data.prompts`"),
        (["label=null"], "no rankings in runs/toy: `train-rm` reads the output of `label`"),
        (["ppo=null"], "no PPO policy in runs/toy: `evaluate` reads the output of `ppo`"),
        (["sft=null", "model.path=null"], "no SFT model in runs/toy: `label` reads the output of `sft`"),
        (
            ["train_rm=null", "ppo=null", "evaluate.policy=base", "evaluate.judge_function=null"],
            "`evaluate` has neither a reward model nor `evaluate.judge_function`",
        ),
    ],
)
def test_missing_inputs(toy, settings, said):
    outcome = toy.run(*(part for setting in settings for part in ("--set", setting)))
    assert outcome.code == 2
    assert said in outcome.stderr
    assert toy.ran() == []


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        (["sft.data=nowhere.jsonl"], 65, "nowhere.jsonl: no such file or folder (`sft.data`)"),
        (["ppo.prompts=nowhere.csv.gz"], 65, "nowhere.csv.gz: no such file or folder (`ppo.prompts`)"),
        (["model.path=./nowhere"], 65, "./nowhere: no such model folder (`model.path`)"),
        (["model.path=gold.py"], 65, "gold.py: is a file, not a model folder"),
        (["ppo.reward_model=/no/where"], 65, "/no/where: no such model folder (`ppo.reward_model`)"),
        (["label.function=nowhere.py:score"], 2, "nowhere.py: no such file (`label.function`)"),
        (["label.function=gold.py"], 2, "`label.function` must name a function; got `gold.py`"),
        (["label.function=no.such.module:score"], 2, "no Python module `no.such.module`"),
        (["ppo.rewards=[{function: 'lost.py:f'}]"], 2, "lost.py: no such file (`ppo.rewards.0"),
    ],
)
def test_missing_files_and_models_are_found_before_the_first_stage(toy, settings, code, said):
    outcome = toy.run(*(part for setting in settings for part in ("--set", setting)))
    assert outcome.code == code
    assert said in outcome.stderr
    assert toy.ran() == []


def test_a_missing_folder_beside_others_is_not_asked_of_the_hub(toy):
    toy.run()
    outcome = toy.run("--set", "ppo.reward_model=runs/reward-model")
    assert outcome.code == 65
    assert "runs/reward-model: no such model folder (`ppo.reward_model`)" in outcome.stderr


def test_a_bad_line_of_ppo_prompts_is_found_before_sft_runs(toy):
    toy.write("later.jsonl", '{"prompt": "fine"}\n{"prompt": 1}\n')
    outcome = toy.run("--set", "ppo.prompts=later.jsonl")
    assert outcome.code == 65
    assert "later.jsonl:2" in outcome.stderr
    assert toy.ran() == []


def test_a_finished_stage_does_not_check_its_data_again(toy):
    toy.run()
    toy.write("unread.jsonl", "no json\n")
    assert toy.run("--from", "train-rm").code == 0


def test_functions_are_named_with_their_hash_once(toy):
    outcome = toy.run()
    assert outcome.stderr.count("sha256 of gold.py: ") == 1
    assert "label.function: will run gold.py:score with your permissions" in outcome.stderr


def test_rewards_need_no_reward_model(toy):
    outcome = toy.run(
        "--set", "train_rm=null", "--set", "label=null", "--set", "ppo.rewards=[{function: 'gold.py:score'}]"
    )
    assert outcome.code == 0, outcome.stderr
    assert list(outcome.statuses) == ["sft", "ppo", "evaluate"]


def test_without_sft_the_base_model_is_the_policy(toy):
    outcome = toy.run("--set", "sft=null")
    assert outcome.code == 0, outcome.stderr
    assert next(iter(outcome.statuses)) == "label"


def test_label_by_import_needs_no_model(toy):
    ranking = '{"prompt": "p", "completions": ["a", "b"], "ranking": [[0], [1]]}\n'
    toy.write("ranked.jsonl", ranking)
    toy.write("recipe.yaml", "label:\n  by: import\n  data: ranked.jsonl\n")
    outcome = toy.rlhf("run", "recipe.yaml", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.statuses == {"label": "done"}


@pytest.mark.parametrize(
    ("arguments", "artifact"),
    [
        (["sft", "--model", "base", "--data", "demos.jsonl"], "sft"),
        (["ppo", "--model", "base", "--reward-model", "base", "--prompts", "prompts.jsonl"], "ppo"),
        (["ppo", "--model", "base", "--function", "gold.py:score", "--prompts", "prompts.jsonl"], "ppo"),
        (["train-rm", "--model", "base", "--data", "ranked.jsonl"], "train-rm"),
        (
            [
                "label",
                "--model",
                "base",
                "--prompts",
                "prompts.jsonl",
                "--by",
                "function",
                "--function",
                "gold.py:score",
            ],
            "label",
        ),
        (["label", "--model", "base", "--prompts", "prompts.jsonl", "--function", "gold.py:score"], "label"),
        (["label", "--data", "ranked.jsonl"], "label"),
        (
            [
                "evaluate",
                "--baseline",
                "base",
                "--policy",
                "base",
                "--prompts",
                "prompts.jsonl",
                "--function",
                "gold.py:score",
            ],
            "evaluate",
        ),
    ],
)
def test_single_stages_without_a_recipe(toy, arguments, artifact):
    toy.write("ranked.jsonl", '{"prompt": "p", "completions": ["a", "b"], "ranking": [[0], [1]]}\n')
    outcome = toy.rlhf(*arguments)
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout == f"runs/default/{artifact}\n"
    assert toy.ran() == [f"{artifact} nothing"]


def test_single_stages_in_order_equal_a_whole_run(toy):
    for stage in ("sft", "label", "train-rm", "ppo", "evaluate"):
        outcome = toy.rlhf(stage, "recipe.yaml")
        assert outcome.code == 0, outcome.stderr
    toy.ran()
    assert toy.run().code == 0
    assert toy.ran() == []


def test_single_stage_reads_the_artifacts_of_its_run_directory(toy):
    toy.run("--to", "label")
    toy.ran()
    outcome = toy.rlhf("train-rm", "--run-dir", "runs/toy")
    assert outcome.code == 0, outcome.stderr
    assert toy.ran() == ["train-rm nothing"]
    assert toy.rlhf("train-rm", "--run-dir", "runs/toy", "--force").code == 0
    assert toy.ran() == ["train-rm nothing"]


def test_single_stage_with_missing_inputs(toy):
    outcome = toy.rlhf("sft", "--model", "base")
    assert outcome.code == 2
    assert "command line: `sft` needs `data`" in outcome.stderr
    assert "hint: `rlhf sft --help` lists the options" in outcome.stderr
    outcome = toy.rlhf("ppo", "--prompts", "prompts.jsonl")
    assert outcome.code == 2
    assert "no SFT model in runs/default: `ppo` reads the output of `sft`" in outcome.stderr


def test_an_artifact_made_from_another_base_model_is_refused(toy):
    toy.run("--set", "sft.epochs=1")
    assert toy.run("--set", "sft.epochs=3", "--to", "sft").code == 0
    toy.ran()
    outcome = toy.run("--set", "sft.epochs=3", "--set", "ppo.steps=9", "--from", "ppo")
    assert outcome.code == 2
    assert "`train-rm` in runs/toy was made from a different `sft` than the current one" in outcome.stderr
    assert "hint: recreate it" in outcome.stderr
    assert toy.ran() == []
    assert toy.run("--set", "sft.epochs=3", "--set", "ppo.steps=9").code == 0


def test_ppo_is_compared_with_the_model_it_started_from(toy):
    import shutil

    shutil.copytree(toy.folder / "base", toy.folder / "mine")
    (toy.folder / "mine" / "extra.txt").write_text("another model")
    assert toy.run("--set", "ppo.model=mine").code == 0
    manifest = json.loads((toy.folder / "runs/toy/evaluate/manifest.json").read_text())
    started = json.loads((toy.folder / "runs/toy/ppo/manifest.json").read_text())
    assert manifest["identity"]["inputs"]["baseline"] == started["identity"]["inputs"]["policy"]
