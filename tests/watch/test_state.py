"""What a run is doing, from its files."""

from __future__ import annotations

import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.watch.state import RunningTask, read_live


def test_a_run_that_goes_on(ppo_run):
    ppo_run.progress()
    with ppo_run.in_use():
        run = read_live(ppo_run.folder)
    assert (run.is_running, run.stage) == (True, "ppo")
    assert run.summary == "sft finished, train-rm finished, ppo running"
    assert [task.text for task in run.tasks] == ["30 of 60 steps, 1:05 left, updates"]
    assert [row["step"] for row in run.rows] == list(range(1, 31))
    first = run.completions[0]
    assert (first.first_step, first.last_step, first.score) == (0, 30, 3.0)
    assert first.first.startswith("Let it rise 0 hours")
    assert first.last.startswith("Let it rise 30 hours")


@pytest.mark.parametrize(("age", "is_running"), [(10, True), (250, True), (400, False)])
def test_a_folder_of_another_machine_goes_on_while_its_progress_is_fresh(ppo_run, age, is_running):
    ppo_run.progress(age=age)
    run = read_live(ppo_run.folder)
    assert run.is_running == is_running
    assert run.summary.endswith("ppo running" if is_running else "ppo killed")
    assert bool(run.tasks) == is_running
    assert run.stage == "ppo"


def test_a_stage_that_has_written_nothing_yet_is_shown(ppo_run):
    (ppo_run.work / "metrics.jsonl").unlink()
    (ppo_run.work / "samples.jsonl").unlink()
    ppo_run.progress()
    run = read_live(ppo_run.folder)
    assert run.summary == "sft finished, train-rm finished, ppo running"
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
    assert read_live(tmp_path).summary == "nothing is running, nothing is done"


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
    assert RunningTask("label", 3, 8, "prompts", "", left, is_guess).text == expected
