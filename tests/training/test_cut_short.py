"""A run whose number of steps is lowered to the steps done: what follows a last step, done once whatever happens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_cli import files
from rlhf_cli.errors import Interrupted
from rlhf_cli.training.checkpoint.store import save_checkpoint
from rlhf_cli.training.loop import TrainingLoop
from rlhf_cli.training.monitoring.run_logger import RunLogger
from rlhf_cli.training.monitoring.samples import ShownCompletion
from tests.stops import StopAtStep
from tests.training.test_loop import Kill, Walk, loop, rows, saved

DONE = 5
SHOWN = [ShownCompletion("Why?", f"Answer {number}.", score=1.0, kl=0.5, tokens=4, ended=True) for number in range(3)]


class EvaluatedWalk(Walk):
    """Is evaluated after a step that has become the last one."""

    def __init__(self, ends_after: int | None = None) -> None:
        super().__init__(ends_after=ends_after)
        self.evaluated: list[int] = []

    def after_last_step(self, step: int, log: RunLogger, watch) -> dict[str, float]:
        self.evaluated.append(step)
        log.show(step, SHOWN)
        return {"eval/reward": float(torch.rand(()))}


def stopped(work: Path, ends_after: int | None = None) -> Path:
    """Return a run of 8 steps that was stopped after 5."""
    with pytest.raises(Interrupted):
        cut(work, EvaluatedWalk(ends_after), steps=8, stop=StopAtStep(DONE)).run()
    return work


def cut(work: Path, task: EvaluatedWalk, steps: int = DONE, stop: StopAtStep | None = None) -> TrainingLoop:
    return loop(task, work, steps=steps, stop=stop, shows_samples=True)


def test_it_is_evaluated_once(tmp_path):
    work, task, again = stopped(tmp_path / "run"), EvaluatedWalk(), EvaluatedWalk()
    assert [row["step"] for row in rows(work)] == [0, 1, 2, 3, 4, 5]
    cut(work, task).run()
    cut(work, again).run()
    assert (task.evaluated, task.ran, again.evaluated) == ([DONE], [], [])
    assert [row["step"] for row in rows(work) if "eval/reward" in row] == [DONE]
    assert rows(work)[-1].keys() == {"step", "loss", "count", "eval/reward"}


def kill_at(monkeypatch, name: str, number: int) -> None:
    """Kill the process in the given call of a function that makes files durable."""
    plain, calls = getattr(files, name), []

    def killing(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == number:
            raise Kill
        plain(*arguments)

    for module in ("files", "training.monitoring.step_lines"):
        if name in vars(__import__(f"rlhf_cli.{module}", fromlist=[name])):
            monkeypatch.setattr(f"rlhf_cli.{module}.{name}", killing)


@pytest.mark.parametrize("name", ["fsync", "rename", "write_whole"])
def test_killed_anywhere_it_ends_as_one_that_was_not(name, tmp_path, monkeypatch, capsys):
    whole = stopped(tmp_path / "whole")
    cut(whole, EvaluatedWalk()).run()
    for number in range(1, 50):
        work = stopped(tmp_path / f"cut-{number}")
        with monkeypatch.context() as patched:
            kill_at(patched, name, number)
            try:
                cut(work, EvaluatedWalk()).run()
            except Kill:
                is_killed = True
            else:
                is_killed = False
        capsys.readouterr()
        cut(work, EvaluatedWalk()).run()
        assert "warning" not in capsys.readouterr().err, "nothing is lost"
        for file in ("metrics.jsonl", "samples.jsonl"):
            assert (work / file).read_bytes() == (whole / file).read_bytes(), (number, file)
        assert saved(work)[-1] == DONE
        if not is_killed:
            break
    assert number > {"fsync": 10, "rename": 3, "write_whole": 1}[name], "it was killed that often"


def test_killed_before_the_evaluation_is_saved_it_can_go_on_as_if_nothing_had_been_evaluated(
    tmp_path, monkeypatch, capsys
):
    whole, work = tmp_path / "whole", stopped(tmp_path / "cut")
    cut(whole, EvaluatedWalk(), steps=8).run()

    def killed(*_arguments: object, **_options: object) -> None:
        raise Kill

    with monkeypatch.context() as patched:
        patched.setattr("rlhf_cli.training.loop.save_checkpoint", killed)
        with pytest.raises(Kill):
            cut(work, EvaluatedWalk()).run()
    assert "eval/reward" in rows(work)[-1]
    capsys.readouterr()
    cut(work, EvaluatedWalk(), steps=8).run()
    assert "warning" not in capsys.readouterr().err
    assert (work / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_run_that_had_ended_there_is_not_evaluated_again(tmp_path):
    work, task = tmp_path / "run", EvaluatedWalk(ends_after=DONE)
    cut(work, EvaluatedWalk(ends_after=DONE), steps=8).run()
    before = (work / "metrics.jsonl").read_bytes()
    cut(work, task).run()
    assert (task.evaluated, task.ran) == ([], [])
    assert (work / "metrics.jsonl").read_bytes() == before


def test_where_the_number_of_steps_was_not_saved_it_says_that_nothing_is_evaluated(tmp_path, monkeypatch, capsys):
    def save_as_before(work: Path, step: int, tensors, state, **options: object) -> None:
        assert state.pop("steps") == 8
        save_checkpoint(work, step, tensors, state, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr("rlhf_cli.training.loop.save_checkpoint", save_as_before)
        work, task = stopped(tmp_path), EvaluatedWalk()
    cut(work, task).run()
    assert task.evaluated == []
    said = " ".join(capsys.readouterr().err.split())
    assert "walk: whether this step was the last is not known; it is not evaluated again" in said
