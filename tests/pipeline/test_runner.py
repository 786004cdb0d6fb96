"""Complete runs: which stages run, which are cached, and the messages."""

from __future__ import annotations

import json

import pytest

ALL = ["sft", "label", "train-rm", "ppo", "evaluate"]


def names(ran: list[str]) -> list[str]:
    return [line.split()[0] for line in ran]


def test_a_run_writes_every_stage_and_a_second_does_nothing(toy):
    first = toy.run()
    assert first.code == 0, first.stderr
    assert names(toy.ran()) == ALL
    assert first.statuses == dict.fromkeys(ALL, "done")
    assert first.json["run_dir"] == "runs/toy"
    assert first.json["metrics"] == {"score": 0.5, "undefined": None}
    second = toy.run()
    assert second.code == 0
    assert toy.ran() == []
    assert second.statuses == dict.fromkeys(ALL, "cached")
    assert second.json["metrics"] == first.json["metrics"]
    assert "nothing to do" in second.stderr


def test_no_hidden_folders_remain(finished):
    record = ["command.txt", "environment.json", "log.txt", "recipe.yaml", "recipes", "report.html", "report.json"]
    assert sorted(path.name for path in finished.run_dir.iterdir()) == sorted([".lock", *ALL, *record])


def test_stdout_is_only_the_last_artifact(toy):
    outcome = toy.rlhf("run", "recipe.yaml")
    assert outcome.stdout == "runs/toy/evaluate\n"
    assert "sft prints to stdout" in outcome.stderr


def test_manifest_records_settings_and_inputs(finished):
    manifest = json.loads((finished.run_dir / "ppo" / "manifest.json").read_text())
    assert manifest["format"] == 3
    assert manifest["stage"] == "ppo"
    assert manifest["settings"]["ppo"]["steps"] == 3
    assert manifest["settings"]["seed"] == 0
    assert set(manifest["identity"]["inputs"]) == {"policy", "reward_model", "prompts"}
    assert manifest["identity"]["upstream"] == {"policy": "sft", "reward_model": "train-rm"}
    assert set(manifest["outputs"]) == {"model.safetensors", "sub/metrics.jsonl"}
    assert manifest["skipped"] == {"too long": 2}
    assert manifest["metrics"] == {"score": 0.5, "undefined": None}
    assert manifest["versions"]["rlhf"]
    assert manifest["versions"]["torch"]
    assert manifest["started"].endswith("Z")
    assert manifest["seconds"] >= 0
    assert manifest["timing"] == {"time/update": 2.5}
    assert str(finished.folder) not in json.dumps(manifest), "a manifest holds nothing of the machine it was made on"


def test_json_and_a_table_say_where_the_time_went(toy):
    first, again = toy.run(), toy.run()
    for outcome in (first, again):  # a cached stage has the times of the attempt that made it
        assert [row["timing"] for row in outcome.json["stages"]] == [{"time/update": 2.5}] * len(ALL)
    assert "ppo: where the time went" in first.stderr
    assert "where the time went" not in again.stderr


def test_a_changed_setting_reruns_its_stage_and_later_ones(finished):
    outcome = finished.run("--set", "train_rm.epochs=2")
    assert names(finished.ran()) == ["train-rm", "ppo", "evaluate"]
    assert "`train_rm.epochs` was 1.0, now 2.0" in outcome.stderr
    assert outcome.json["stages"][3]["reason"] == "the output of `train-rm` changed"


def test_a_changed_seed_runs_everything(finished):
    finished.run("--seed", "7")
    assert names(finished.ran()) == ALL


def test_changed_data_runs_the_stages_that_read_it(finished):
    finished.write("prompts.jsonl", '{"prompt": "another"}\n')
    outcome = finished.run()
    assert names(finished.ran()) == ["label", "train-rm", "ppo", "evaluate"]
    assert "the content of `data.prompts` changed" in outcome.stderr


def test_a_changed_function_runs_the_stages_that_call_it(finished):
    finished.write("gold.py", "def score(prompts, completions):\n    return [1.0 for _ in completions]\n")
    finished.run()
    assert names(finished.ran()) == ["label", "evaluate"], "the labels came out the same"


def test_a_changed_attention_function_reruns_everything(finished, monkeypatch):
    monkeypatch.syspath_prepend(finished.folder)
    own = ("--set", "model.attention=mine:attend")
    finished.write("mine.py", "raise SystemExit('hashed, not run')\ndef attend(): ...\n")
    outcome = finished.run(*own)
    assert outcome.stderr.count("model.attention: will run mine:attend with your permissions") == 1
    assert names(finished.ran()) == ALL
    finished.run(*own)
    assert finished.ran() == []
    finished.write("mine.py", "raise SystemExit('other')\ndef attend(): ...\n")
    outcome = finished.run(*own)
    assert names(finished.ran()) == ALL
    assert "the content of `model.attention` changed" in outcome.stderr
    assert "no Python module `lost`" in finished.run("--set", "model.attention=lost:attend").stderr
    assert "has no function `attent` (`model.attention`)" in finished.run("--set", "model.attention=mine:attent").stderr


def test_a_changed_base_model_runs_everything(finished):
    finished.write("base/model.safetensors", "weighty")
    outcome = finished.run()
    assert names(finished.ran()) == ALL
    assert "the content of `model.path` changed" in outcome.stderr


@pytest.mark.parametrize(
    "setting",
    [
        "ppo.micro_batch_size=1",
        "ppo.rollout_batch_size=1",
        "label.sampling.batch_size=1",
        "sft.checkpoint_steps=1",
        "sft.gradient_checkpointing=true",
        "evaluate.shown_samples=1",
        "model.device=cpu",
        "data.max_skip=0.5",
    ],
)
def test_effort_settings_rerun_nothing(finished, setting):
    assert finished.run("--set", setting).code == 0
    assert finished.ran() == []


def test_a_renamed_data_file_reruns_nothing(finished):
    (finished.folder / "prompts.jsonl").rename(finished.folder / "other.jsonl")
    assert finished.run("--prompts", "other.jsonl").code == 0
    assert finished.ran() == []


def test_a_rerun_with_the_same_output_does_not_rerun_later_stages(finished):
    outcome = finished.run("--force", "sft")
    assert names(finished.ran()) == ["sft"]
    assert outcome.statuses == {"sft": "done", **dict.fromkeys(ALL[1:], "cached")}


def test_force_may_be_repeated(finished):
    finished.run("--force", "sft", "--force", "ppo")
    assert names(finished.ran()) == ["sft", "ppo"]


def test_to_is_the_last_stage_and_from_reuses_earlier_artifacts(toy):
    assert toy.run("--to", "label").statuses == {"sft": "done", "label": "done"}
    toy.ran()
    outcome = toy.run("--from", "train-rm", "--to", "ppo", "--set", "sft.epochs=9")
    assert outcome.code == 0, outcome.stderr
    assert names(toy.ran()) == ["train-rm", "ppo"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "ppo", "--to", "sft"], "`--from ppo` comes after `--to sft`"),
        (["--from", "pop"], "`--from pop`: no such stage, did you mean `ppo`?"),
        (["--force", "judgement"], "`--force judgement`: no such stage"),
        (["--to", "train_rm"], "no such stage, did you mean `train-rm`?"),
        (["--force", "sft", "--from", "ppo"], "`--force sft` is outside the stages"),
        (["--set", "evaluate=null", "--to", "evaluate"], "the recipe has no such stage"),
    ],
)
def test_invalid_stage_selections(toy, arguments, said):
    outcome = toy.run(*arguments)
    assert outcome.code == 2
    assert said in outcome.stderr
    assert toy.ran() == []


def test_dry_run_says_what_and_why_and_writes_nothing(toy):
    outcome = toy.run("--dry-run")
    assert outcome.statuses == dict.fromkeys(ALL, "would run")
    assert outcome.json["stages"][0]["reason"] == "it has not run yet"
    assert not (toy.folder / "runs").exists()
    toy.run()
    toy.ran()
    outcome = toy.run("--dry-run", "--set", "ppo.steps=4")
    assert outcome.statuses == {"sft": "cached", "label": "cached", "train-rm": "cached"} | dict.fromkeys(
        ["ppo", "evaluate"], "would run"
    )
    assert "`ppo.steps` was 3, now 4" in outcome.stderr
    assert toy.ran() == []


def test_run_dir_option_sets_the_folder(toy):
    outcome = toy.run("--run-dir", "elsewhere/here")
    assert outcome.json["run_dir"] == "elsewhere/here"
    assert (toy.folder / "elsewhere" / "here" / "ppo" / "manifest.json").is_file()


def test_paths_are_also_resolved_against_the_recipe(toy):
    (toy.folder / "elsewhere").mkdir()
    outcome = toy.rlhf("run", "recipe.yaml")
    toy.ran()
    environment = {"FAKE_LOG": str(toy.log)}
    toy.folder, inside = toy.folder / "elsewhere", toy.folder
    outcome = toy.rlhf("run", "../recipe.yaml", "--run-dir", "../runs/toy", **environment)
    toy.folder = inside
    assert outcome.code == 0, outcome.stderr
    assert toy.ran() == [], "the same content under another path is the same"
