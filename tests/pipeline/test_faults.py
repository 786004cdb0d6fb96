"""Faults: kills, damage, settings changed during unfinished work, full disks, signals, concurrent runs."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from pathlib import Path

import pytest

from rlhf_cli.errors import RunInUseError
from rlhf_cli.pipeline import run_directory
from rlhf_cli.pipeline.run_directory import RunDirectory

ALL = ["sft", "label", "train-rm", "ppo", "evaluate"]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


@pytest.mark.parametrize("stage", ALL)
@pytest.mark.slow
def test_kill_9_in_a_stage_then_the_same_command_resumes(toy, stage):
    killed = toy.run(FAKE_DIE=stage)
    assert killed.code == -signal.SIGKILL
    done = ALL[: ALL.index(stage)]
    assert toy.ran() == [f"{name} nothing" for name in [*done, stage]]
    assert not (toy.run_dir / stage).exists(), "an unfinished stage has no artifact"
    again = toy.run()
    assert again.code == 0, again.stderr
    assert toy.ran() == [f"{stage} step 3", *(f"{name} nothing" for name in ALL[ALL.index(stage) + 1 :])]
    assert again.statuses == {name: "cached" if name in done else "done" for name in ALL}
    assert not (toy.run_dir / stage / "half.txt").exists()


@pytest.mark.slow
def test_changed_setting_under_unfinished_work_is_refused_by_name(toy):
    toy.run(FAKE_DIE="ppo")
    toy.ran()
    refused = toy.run("--set", "ppo.learning_rate=1e-6", "--set", "ppo.steps=7")
    assert refused.code == 2
    assert "unfinished `ppo`" in refused.stderr
    assert "`ppo.learning_rate` was null, now 1e-06; `ppo.steps` was 3, now 7" in refused.stderr
    assert "hint: undo the change to resume, or discard the unfinished work with `--force ppo`; then" in refused.stderr
    assert "; then `ppo` and `evaluate` run" in refused.stderr
    assert toy.ran() == []
    forced = toy.run("--set", "ppo.learning_rate=1e-6", "--force", "ppo")
    assert forced.code == 0
    assert toy.ran() == ["ppo nothing", "evaluate nothing"]


@pytest.mark.slow
def test_a_change_upstream_of_unfinished_work_is_refused_before_anything_runs(toy):
    toy.run(FAKE_DIE="ppo")
    toy.ran()
    refused = toy.run("--set", "sft.epochs=2")
    assert refused.code == 2
    assert "unfinished `ppo` that was started differently: its input from `sft` will change" in (refused.stderr)
    assert "; then `sft`, `label`, `train-rm`, `ppo` and `evaluate` run" in refused.stderr
    assert toy.ran() == []


@pytest.mark.slow
def test_changed_data_under_unfinished_work_is_refused(toy):
    toy.run(FAKE_DIE="ppo")
    toy.ran()
    toy.write("prompts.jsonl", '{"prompt": "another"}\n')
    refused = toy.run("--from", "ppo")
    assert refused.code == 2
    assert "the content of `data.prompts` changed" in refused.stderr


@pytest.mark.parametrize(
    ("content", "settings", "expected"),
    [
        pytest.param('{"prompt": "a"}\n{"prompt": \n', [], "prompts.jsonl:2: the record ends", id="broken"),
        pytest.param('{"text": "a"}\n', [], "prompts.jsonl:1: ", id="without-a-prompt"),
        pytest.param(None, [], "prompts.jsonl: no such file", id="missing"),
        pytest.param(
            '{"text": "a"}\n',
            ["--set", "data.columns={prompt: ask}"],
            "`data.columns` maps `prompt` to `ask`, which is not there",
            id="unknown-column",
        ),
    ],
)
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]], ids=["run", "dry-run"])
@pytest.mark.slow
def test_what_is_wrong_with_a_changed_input_is_said_before_that_it_changed(toy, content, settings, expected, dry_run):
    toy.run(FAKE_DIE="ppo")
    toy.ran()
    if content is None:
        (toy.folder / "prompts.jsonl").unlink()
    else:
        toy.write("prompts.jsonl", content)
    refused = toy.run("--from", "ppo", *settings, *dry_run)
    assert refused.code == 65, refused.stderr
    assert expected in " ".join(refused.stderr.split())
    assert "started differently" not in refused.stderr
    assert toy.ran() == []


@pytest.mark.slow
def test_effort_settings_may_change_under_unfinished_work(toy):
    toy.run(FAKE_DIE="ppo")
    toy.ran()
    assert toy.run("--set", "ppo.micro_batch_size=1").code == 0
    assert toy.ran() == ["ppo step 3", "evaluate nothing"]


@pytest.mark.slow
def test_a_stage_that_failed_before_any_checkpoint_restarts_with_other_settings(toy):
    toy.run(FAKE_DIE="ppo")
    (toy.run_dir / ".ppo.work" / "checkpoint.txt").unlink()
    toy.ran()
    assert toy.run("--set", "ppo.steps=4").code == 0
    assert toy.ran() == ["ppo nothing", "evaluate nothing"]


@pytest.mark.slow
def test_a_lost_record_of_unfinished_work_is_refused(toy):
    toy.run(FAKE_DIE="ppo")
    record = toy.run_dir / ".ppo.began.json"
    whole = record.read_text()
    for damaged in ('{"stage"', "[]", "{}", whole.replace('"ppo.steps": 3', '"ppo.steps": 4', 1), whole[:-2]):
        record.write_text(damaged)
        refused = toy.run()
        assert refused.code == 2
        assert "runs/toy/.ppo.began.json, which records its settings, is missing or damaged" in (
            " ".join(refused.stderr.split())
        )
    record.write_text(whole)
    toy.ran()
    assert toy.run().code == 0
    assert toy.ran() == ["ppo step 3", "evaluate nothing"]


@pytest.mark.slow
def test_unfinished_work_of_another_version_is_refused(toy):
    toy.run(FAKE_DIE="ppo")
    record = toy.run_dir / ".ppo.began.json"
    sealed = json.loads(record.read_text())
    del sealed["format"]
    record.write_text(json.dumps(sealed))
    refused = toy.run()
    assert refused.code == 2
    assert "was written by an earlier version of rlhf: it has format 1" in " ".join(refused.stderr.split())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "model.safetensors").write_text("sft 0000000000000000\n"), "its sha256 differs"),
        (lambda f: (f / "model.safetensors").write_text("x"), "has 1 bytes"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "manifest.json").write_text('{"format": 2, "st'), "manifest.json is incomplete"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is not a manifest"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    ],
)
def test_a_damaged_artifact_is_reported_and_recreated(finished, damage, said):
    damage(finished.run_dir / "sft")
    outcome = finished.run()
    assert outcome.code == 0, outcome.stderr
    assert said in outcome.stderr
    assert finished.ran() == ["sft nothing"], "what follows reads the same again"


def test_a_forged_manifest_is_detected(finished):
    path = finished.run_dir / "evaluate" / "manifest.json"
    plain = json.loads(path.read_text())
    plain["metrics"]["score"] = 0.9
    path.write_text(json.dumps(plain))
    outcome = finished.run()
    assert "its checksum differs" in outcome.stderr
    assert outcome.json["metrics"]["score"] == 0.5


@pytest.mark.parametrize(("version", "said"), [(2, "by an earlier version of rlhf"), (4, "by a later version of rlhf")])
def test_a_manifest_of_another_format_is_refused_and_kept(finished, version, said):
    path = finished.run_dir / "sft" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": version}))
    outcome = finished.run()
    assert outcome.code == 2
    assert said in outcome.stderr
    assert f"it has format {version}, and this version reads format 3" in outcome.stderr


def test_from_does_not_build_on_a_damaged_artifact(finished):
    (finished.run_dir / "sft" / "model.safetensors").write_text("x")
    outcome = finished.run("--from", "ppo", "--force", "ppo")
    assert outcome.code == 65
    assert "`sft` in runs/toy is damaged" in outcome.stderr


def test_killed_between_the_renames_loses_nothing(finished):
    run = finished.run_dir
    (run / "ppo").rename(run / ".ppo.output")  # complete, and its name not given yet
    (run / ".ppo.work").mkdir()
    (run / "sft").rename(run / ".sft.old")  # moved aside, and its successor torn
    (run / ".sft.output").mkdir()
    (run / ".sft.output" / "half.txt").write_text("half")
    outcome = finished.run()
    assert outcome.statuses == dict.fromkeys(ALL, "cached"), outcome.stderr
    assert finished.ran() == []
    assert not (run / ".ppo.work").exists()


@pytest.mark.slow
def test_two_runs_in_one_directory(toy):
    first = toy.start("run", "recipe.yaml", FAKE_HANG="sft")
    wait_for(Path(f"{toy.log}.hanging"))
    second = toy.run()
    assert second.code == 75
    assert f"runs/toy is in use by process {first.pid}" in second.stderr
    assert toy.run("--run-dir", "other").code == 0
    first.kill()
    first.communicate()
    assert toy.run().code == 0, "the lock dies with its process"


def test_a_run_in_use_names_the_other_machine(tmp_path, monkeypatch):
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    with monkeypatch.context() as other:
        other.setattr(run_directory.socket, "gethostname", lambda: "node7")
        held = first.lock()
        held.__enter__()
    try:
        with pytest.raises(RunInUseError, match=rf"is in use by process {os.getpid()} on node7$"), second.lock():
            pass
    finally:
        held.__exit__(None, None, None)


def test_a_lock_file_of_a_dead_process_locks_nothing(toy):
    toy.run_dir.mkdir(parents=True)
    for left in (b"4194304\n", b"\xff\xfe\x00 no number", b"1\n" * 1000):
        (toy.run_dir / ".lock").write_bytes(left)
        assert toy.run().code == 0


def test_a_damaged_lock_file_still_locks(toy):
    toy.run_dir.mkdir(parents=True)
    (toy.run_dir / ".lock").write_bytes(b"\xff\xfe")
    with (toy.run_dir / ".lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert toy.run().code == 75


def test_the_lock_is_a_flock(toy):
    toy.run_dir.mkdir(parents=True)
    with (toy.run_dir / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert toy.run().code == 75


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
@pytest.mark.slow
def test_signals_stop_resumably(toy, signum, code):
    process = toy.start("run", "recipe.yaml", FAKE_HANG="train-rm")
    wait_for(Path(f"{toy.log}.hanging"))
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"{signum.name}: stopping after step 2 of 3 of train-rm, " in stderr
    assert "run the same command again" in stderr
    assert "Traceback" not in stderr
    toy.ran()
    assert toy.run().code == 0
    assert toy.ran() == ["train-rm step 3", "ppo nothing", "evaluate nothing"]


@pytest.mark.slow
def test_the_first_interrupt_ends_at_once_what_would_save_nothing(toy):
    process = toy.start("run", "recipe.yaml", FAKE_LOAD="sft")
    wait_for(Path(f"{toy.log}.hanging"))
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert time.monotonic() - began < 5  # the interpreter's own end takes part of it
    assert (process.returncode, "error: stopped by SIGINT" in stderr, "Traceback" in stderr) == (130, True, False)


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(toy):
    process = toy.start("run", "recipe.yaml", FAKE_HANG="sft", FAKE_DEAF="1")
    wait_for(Path(f"{toy.log}.hanging"))
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("full", 74, "no space left on device while writing under runs/toy, with "),
        ("full-in-library", 74, "no space left on device"),
        ("memory", 1, "out of memory in `sft`"),
        ("diverged", 70, "error: loss was nan in 3 steps in a row"),
        ("interrupt", 130, "stopped by SIGINT"),
    ],
)
def test_failures_of_a_stage(toy, kind, code, said):
    outcome = toy.run(FAKE_RAISE=f"sft:{kind}")
    assert outcome.code == code
    assert said in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert json.loads(outcome.stdout)["error"]["exit_code"] == code
    assert not (toy.run_dir / "sft").exists()


@pytest.mark.parametrize(
    ("stage", "given", "hint"),
    [
        ("sft", (), "hint: set `sft.gradient_checkpointing` to true; the result stays the same"),
        (
            "sft",
            ("--set", "sft.gradient_checkpointing=true"),
            "hint: use `model.quantize`, or a smaller model; the stage then",
        ),
        (
            "sft",
            ("--set", "sft.gradient_checkpointing=true", "--set", "sft.adapter=none"),
            "hint: use `sft.adapter: lora`, or a smaller model; the stage then",
        ),
        ("ppo", (), "set `ppo.gradient_checkpointing` to true, or lower `ppo.rollout_batch_size`; the result"),
        ("evaluate", (), "hint: lower `evaluate.sampling.batch_size`; the result stays the same"),
    ],
)
def test_the_hint_without_memory_names_settings_that_are_still_to_try(toy, stage, given, hint):
    assert hint in toy.run(*given, FAKE_RAISE=f"{stage}:memory").stderr


def test_a_bug_shows_its_traceback(toy):
    outcome = toy.run(FAKE_RAISE="sft:bug")
    assert outcome.code == 1
    assert "ZeroDivisionError: a bug" in outcome.stderr
    assert "this is a bug in rlhf" in outcome.stderr


def test_a_run_directory_that_is_a_file(toy):
    toy.write("taken", "")
    outcome = toy.run("--run-dir", "taken")
    assert outcome.code == 2
    assert "taken is a file, not a run directory" in outcome.stderr
