"""What a run is doing, from its files."""

from __future__ import annotations

import shutil
import socket
import threading

import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.training.monitoring.step_lines import readable_rows
from rlhf_cli.watch import state
from rlhf_cli.watch.state import RunningTask, Watcher, read_live


def test_a_run_that_goes_on(ppo_run):
    ppo_run.progress(host=socket.gethostname())
    with ppo_run.in_use():
        run = read_live(ppo_run.folder)
    assert (run.is_running, run.stage) == (True, "ppo")
    assert run.summary == "sft finished, label finished, train-rm finished, ppo running"
    assert [task.text for task in run.tasks] == ["30 of 60 steps, 1:05 left, updates"]
    assert [row["step"] for row in run.rows] == list(range(1, 31))
    first = run.completions[0]
    assert (first.first_step, first.last_step, first.score) == (0, 30, 3.0)
    assert first.first.startswith("Let it rise 0 hours")
    assert first.last.startswith("Let it rise 30 hours")


@pytest.mark.parametrize(("age", "is_running"), [(10, True), (250, True), (400, False), (-250, True), (-400, False)])
def test_a_folder_of_another_machine_goes_on_while_its_progress_is_fresh(ppo_run, age, is_running):
    ppo_run.progress(age=age)
    run = read_live(ppo_run.folder)
    assert run.is_running == is_running
    assert run.summary.endswith("ppo running" if is_running else "ppo killed")
    assert bool(run.tasks) == is_running
    assert run.stage == "ppo"


def test_a_process_of_this_machine_is_known_by_its_lock(ppo_run):
    ppo_run.progress(host=socket.gethostname())
    run = read_live(ppo_run.folder)
    assert (run.is_running, run.states["ppo"], list(run.tasks)) == (False, "killed", [])


def test_a_stage_that_runs_again_is_not_its_earlier_artifact(ppo_run):
    """As after `--force train-rm`, beside PPO work that a kill left."""
    ppo_run.progress(stage="train-rm")
    run = read_live(ppo_run.folder)
    assert run.states == {"sft": "finished", "label": "finished", "train-rm": "running", "ppo": "killed"}
    assert (run.stage, run.rows) == ("train-rm", []), "its first attempt has 40 steps"


def test_between_two_stages_a_process_is_running(ppo_run):
    ppo_run.progress(stage=None, tasks=[])
    run = read_live(ppo_run.folder)
    assert (run.is_running, run.stage, run.states["ppo"]) == (True, "ppo", "running")


@pytest.mark.parametrize(
    "changes",
    [
        {"time": None}, {"time": "soon"}, {"stage": ["ppo"]}, {"stage": "/etc"}, {"stage": "../other"},
        {"tasks": [{"label": "ppo"}]}, {"tasks": 3},
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_understood_is_as_none(ppo_run, changes):
    ppo_run.progress(**changes)
    assert read_live(ppo_run.folder).is_running is False


def test_what_other_processes_wrote_has_no_control_characters(ppo_run):
    shown = {
        "label": "a\x1b]0;owned\x07b",
        "done": 1,
        "total": 2,
        "unit": "steps\u202e",
        "doing": "\x1b[31mc",
        "new": 1,
    }
    ppo_run.progress(tasks=[shown])
    (task,) = read_live(ppo_run.folder).tasks
    assert (task.label, task.text) == ("ab", "1 of 2 steps, c")


def test_only_what_was_added_is_read_and_a_file_that_is_replaced_is_read_again(ppo_run, monkeypatch):
    monkeypatch.setattr(state, "FRESH", -1.0)
    watcher = Watcher(ppo_run.folder)
    assert len(watcher.look().rows) == 30
    read: list[int] = []
    monkeypatch.setattr(state, "readable_rows", lambda data: read.append(len(data)) or readable_rows(data))
    path = ppo_run.work / "metrics.jsonl"
    line = b'{"step": 31, "objective/kl": 3.5}\n'
    with path.open("ab") as file:
        file.write(line + b'{"step": 32, "obj')
    assert [row["step"] for row in watcher.look().rows][-2:] == [30, 31]
    assert read == [len(line)]
    path.unlink()
    ppo_run.steps(5)
    assert len(watcher.look().rows) == 5


def test_folders_that_disappear_meanwhile_do_not_end_the_watching(ppo_run, monkeypatch):
    monkeypatch.setattr(state, "FRESH", -1.0)
    watcher, ended = Watcher(ppo_run.folder), threading.Event()

    def churn() -> None:
        while not ended.is_set():
            for number in range(20):
                (ppo_run.work / f"checkpoint-{number}" / "deep").mkdir(parents=True)
            for number in range(20):
                shutil.rmtree(ppo_run.work / f"checkpoint-{number}")

    writer = threading.Thread(target=churn)
    writer.start()
    try:
        assert all(watcher.look().stage == "ppo" for _ in range(150))
    finally:
        ended.set()
        writer.join()


def test_two_that_watch_do_not_take_one_another_for_a_run(ppo_run):
    with ppo_run.in_use():
        pass  # leaves a lock file
    run = RunDirectory(ppo_run.folder)
    seen: set[bool] = set()
    threads = [threading.Thread(target=lambda: seen.update(run.is_in_use for _ in range(2000))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {False}


def test_a_stage_that_has_written_nothing_yet_is_shown(ppo_run):
    (ppo_run.work / "metrics.jsonl").unlink()
    (ppo_run.work / "samples.jsonl").unlink()
    ppo_run.progress()
    run = read_live(ppo_run.folder)
    assert run.summary == "sft finished, label finished, train-rm finished, ppo running"
    assert (run.stage, run.rows, run.completions) == ("ppo", [], [])


def test_without_a_running_stage_the_last_one_with_metrics_is_shown(ppo_run):
    (ppo_run.work / "metrics.jsonl").unlink()
    (ppo_run.work / "samples.jsonl").unlink()
    run = read_live(ppo_run.folder)
    assert (run.is_running, run.stage, len(run.rows)) == (False, "train-rm", 40)


def test_what_stands_out_is_a_finding_of_the_stage_that_is_shown(ppo_run):
    assert read_live(ppo_run.folder).findings == []
    ppo_run.steps(30, **{"val/explained_variance": -1.0})
    assert [one.subject for one in read_live(ppo_run.folder).findings] == ["critic"]


def test_a_torn_line_and_a_torn_progress_record_are_skipped(ppo_run):
    path = ppo_run.work / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    (ppo_run.folder / ".progress.json").write_text('{"stage": "pp')
    run = read_live(ppo_run.folder)
    assert (len(run.rows), run.is_running) == (29, False)


def test_a_run_directory_that_is_only_made_yet(tmp_path):
    assert read_live(tmp_path).summary == "no process is running, and no stage is done"


def test_what_is_no_run_directory_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such run directory"):
        read_live(tmp_path / "absent")


@pytest.mark.parametrize(
    ("left", "is_guess", "expected"),
    [
        (None, False, "3 of 8 prompts"),
        (5.0, True, "3 of 8 prompts, ~0:05 left"),
        (3700.0, False, "3 of 8 prompts, 1:01:40 left"),
    ],
)
def test_the_time_left(left, is_guess, expected):
    assert (
        RunningTask(label="a", done=3, total=8, unit="prompts", seconds_left=left, is_guess=is_guess).text == expected
    )
