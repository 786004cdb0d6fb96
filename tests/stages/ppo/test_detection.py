"""Detectors in the trainer: what is logged, saved and kept when one warns or stops the run."""

from __future__ import annotations

import json

import pytest
import torch

from rlhf_cli.errors import DetectorStopError
from rlhf_cli.stages.ppo.detection import watched_rewards
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.training.checkpoint.store import latest_checkpoint
from rlhf_cli.training.monitoring.run_files import DETECTIONS, ENDED
from rlhf_cli.training.monitoring.step_lines import read_rows

# Acts below its threshold, which no run of a few steps is above.
WARNS = {"steps": 6, "detectors": {"reward_spread": {"warn": 100.0}}}
STOPS = {"steps": 6, "detectors": {"reward_spread": {"warn": 100.0, "stop": 50.0}}}


def test_a_passed_stop_saves_names_what_is_kept_and_a_higher_one_continues(
    tiny_llama, tmp_path, make_trainer, rows_of, capsys
):
    whole = make_trainer(tiny_llama, tmp_path / "whole", **WARNS)
    whole.train()

    work = tmp_path / "w"
    with pytest.raises(DetectorStopError) as stopped:
        make_trainer(tiny_llama, work, **STOPS).train()
    assert stopped.value.exit_code == 70
    last = rows_of(work)[-1]["step"]
    assert last < 6
    safe = last - 1  # the first step that could be judged warned: a checkpoint is written after each
    assert f"stopped the run after step {last} of 6" in stopped.value.message
    assert "`ppo.detectors.reward_spread.stop: 50`" in stopped.value.message
    assert str(work / f"step-{safe:08d}") in stopped.value.message
    assert "--set ppo.detectors.reward_spread.stop=null" in stopped.value.hint
    assert latest_checkpoint(work, up_to=safe).step == safe
    assert json.loads((work / ENDED).read_text())["error"] == "DetectorStopError"
    (found,) = read_rows(work / DETECTIONS)
    assert (found["detector"], found["status"], found["step"]) == ("reward_spread", "stop", last)
    assert len(found["completions"]) == 3
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("detector `reward_spread`") == 2  # of both runs, once each
    assert found["completions"][0]["prompt"] in told

    with pytest.raises(DetectorStopError):  # the same command stops at once
        make_trainer(tiny_llama, work, **STOPS).train()
    assert rows_of(work)[-1]["step"] == last

    resumed = make_trainer(tiny_llama, work, **WARNS)
    resumed.train()
    assert (work / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert not (work / ENDED).exists()
    expected, found = whole.models.state(), resumed.models.state()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_checkpoint_before_the_warning_is_kept_however_old(tiny_llama, tmp_path, make_trainer):
    work = tmp_path / "w"
    make_trainer(tiny_llama, work, **WARNS | {"steps": 8}).train()
    kept = sorted(int(path.name.partition("-")[2]) for path in work.glob("step-*"))
    assert kept == [2, 7, 8]


def test_measured_quantities_are_in_the_metrics_of_a_step(tiny_llama, tmp_path, make_trainer, rows_of):
    make_trainer(tiny_llama, tmp_path / "w", steps=4, eval_steps=2).train()
    rows = rows_of(tmp_path / "w")
    assert "detectors/kl" not in rows[2]  # of steps 1 and 2 there are no three steps yet
    kl = [row["objective/kl"] for row in rows[2:]]
    assert rows[4]["detectors/kl"] == pytest.approx(sum(kl) / 3, abs=1e-5)
    assert rows[3]["detectors/length"] == 1.0
    assert {"detectors/entropy", "detectors/reward_spread", "detectors/repetition"} <= rows[4].keys()


def test_detectors_change_nothing_of_what_is_learned(tiny_llama, tmp_path, make_trainer):
    trained = []
    for number, limits in enumerate(({}, {"kl": {"warn": 1e-9}, "length": {"warn": None}})):
        trainer = make_trainer(tiny_llama, tmp_path / str(number), steps=4, detectors=limits)
        trainer.train()
        trained.append(trainer.models.state())
    assert all(torch.equal(trained[1][name], tensor) for name, tensor in trained[0].items())


def test_the_range_of_the_reward_model_is_that_of_its_manifest(tmp_path):
    settings = PPOSettings()
    (tmp_path / "manifest.json").write_text(json.dumps({"metrics": {"rm/lowest": -2.0, "rm/highest": 3.0}}))
    watched = watched_rewards(settings, {"reward-model": 1.0}, reward_model=str(tmp_path), held_out=30)
    assert (watched.model, watched.model_range, watched.held_out) == ("reward-model", (-2.0, 3.0), 30)
    for content in ("{}", "no json", json.dumps({"metrics": {"rm/lowest": None, "rm/highest": 1.0}})):
        (tmp_path / "manifest.json").write_text(content)
        assert watched_rewards(settings, {"a": 1.0}, reward_model=str(tmp_path), held_out=0).model_range is None
    assert watched_rewards(settings, {"a": 1.0}, reward_model="acme/hub-model", held_out=0).model_range is None
