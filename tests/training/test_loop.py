"""The training loop of all stages, with a task of two weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DivergedError, Interrupted
from rlhf_cli.training.loop import TrainingLoop
from rlhf_cli.training.monitoring.run_logger import RunLogger
from rlhf_cli.training.task import StepReport, TrainingTask
from rlhf_cli.training.timing import StepWatch
from tests.stops import NeverStop, StopAtStep

STEPS = 8


class Kill(BaseException):
    """Nothing handles it, as nothing handles SIGKILL."""


class Walk(TrainingTask):
    """Moves its weights by a random gradient. `bad` maps a step (0-based) to how often it is bad."""

    def __init__(self, bad: dict[int, int] | None = None, ends_after: int | None = None) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1)
        self.bad, self.ends_after, self.count, self.scale = dict(bad or {}), ends_after, 0, 1.0
        self.ran: list[int] = []
        self.kill_in: int | None = None

    def scale_learning_rates(self, factor: float) -> None:
        self.scale = factor

    def step(self, step: int, watch: StepWatch | None = None) -> StepReport:
        if step == self.kill_in:
            raise Kill
        self.ran.append(step)
        if self.bad.get(step, 0):
            self.bad[step] -= 1
            return StepReport({"loss": float("nan")}, skipped=1, fault="a bad step")
        self.optimizer.param_groups[0]["lr"] = 0.1 * self.scale
        self.weight.grad = torch.randn(2) + random.random()
        self.optimizer.step()
        return StepReport({"loss": float(self.weight.detach().sum())})

    def weights(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def extra_state(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.count = state["count"]

    @property
    def has_ended(self) -> bool:
        return self.count == self.ends_after

    def before_first_step(self, log: RunLogger, watch) -> None:
        log.write(0, {"start": 1.0})

    def after_step(self, step: int, report: StepReport, log: RunLogger, watch) -> None:
        self.count += 1
        report.metrics["count"] = float(self.count)


def loop(
    task: Walk,
    work: Path,
    *,
    steps: int = STEPS,
    stop: StopAtStep | None = None,
    checkpoint_steps: int = 2,
    checkpoint_async: bool = False,
    shows_samples: bool = False,
) -> TrainingLoop:
    work.mkdir(exist_ok=True)
    return TrainingLoop(
        task,
        label="walk",
        steps=steps,
        checkpoint_steps=checkpoint_steps,
        seed=3,
        work=work,
        stop=stop or NeverStop(),
        processes=ProcessGroup(),
        hint="walk more slowly",
        checkpoint_async=checkpoint_async,
        shows_samples=shows_samples,
    )


def rows(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def saved(work: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in work.glob("step-*"))


@pytest.mark.parametrize("kill_in", range(STEPS))
def test_killed_anywhere_and_resumed_ends_with_the_bytes_of_an_uninterrupted_run(kill_in, tmp_path):
    bad = {1: 1, 4: 1}
    loop(Walk(bad), tmp_path / "whole").run()
    killed = Walk(bad)
    killed.kill_in = kill_in
    with pytest.raises(Kill):
        loop(killed, tmp_path / "cut").run()
    # What was bad before the checkpoint does not run again.
    loop(Walk({step: 1 for step in bad if step >= saved(tmp_path / "cut")[-1]}), tmp_path / "cut").run()
    whole, cut = (_files(tmp_path / name) for name in ("whole", "cut"))
    assert whole == cut
    # Times are not a function of seed and step: they alone may differ, and they have one line a step.
    assert {"metrics.jsonl", "timing.jsonl", "step-00000008/tensors.safetensors", "step-00000008/state.json"} <= whole
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut/timing.jsonl").read_text().splitlines()]
    assert steps == list(range(STEPS + 1))
    for name in whole - {"timing.jsonl"}:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_a_signal_saves_the_step_that_was_running_and_says_where_it_resumes(tmp_path, capsys):
    whole, task = Walk(), Walk()
    loop(whole, tmp_path / "whole", checkpoint_steps=100).run()
    with pytest.raises(Interrupted):
        loop(Walk(), tmp_path / "cut", stop=StopAtStep(3), checkpoint_steps=100).run()
    assert saved(tmp_path / "cut") == [0, 3]
    loop(task, tmp_path / "cut", checkpoint_steps=100).run()
    assert task.ran == [3, 4, 5, 6, 7]
    assert "walk: resuming from step 3 of 8" in capsys.readouterr().err
    assert torch.equal(task.weight, whole.weight)


def test_a_signal_in_the_last_step_leaves_a_finished_run(tmp_path):
    with pytest.raises(Interrupted):
        loop(Walk(), tmp_path, stop=StopAtStep(STEPS)).run()
    again = Walk()
    loop(again, tmp_path).run()
    assert again.ran == []


def test_two_bad_steps_are_counted_and_three_roll_back_to_the_last_regular_checkpoint(tmp_path, capsys):
    task = Walk({1: 1, 2: 1, 4: 1, 5: 1, 6: 1})
    state = loop(task, tmp_path).run()
    # Step 2 is due for a checkpoint (`checkpoint_steps`) but bad, and so is step 6; step 4 is the last good one.
    assert task.ran == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7]
    assert (state.skipped_steps, state.rolled_back, state.bad_steps) == (5, True, 0)
    assert task.scale == 0.5
    assert [row["step"] for row in rows(tmp_path)] == list(range(STEPS + 1))
    assert [row["count"] for row in rows(tmp_path)[1:]] == list(range(1, STEPS + 1)), "the task rolled back too"
    said = " ".join(capsys.readouterr().err.split())
    assert "step 7: optimizer steps were skipped in steps 5 to 7: a bad step; rolling back to step 4 with half" in said


def test_a_signal_among_bad_steps_does_not_change_where_a_run_rolls_back_to(tmp_path, capsys):
    with pytest.raises(Interrupted):
        loop(Walk({2: 1, 3: 1}), tmp_path, stop=StopAtStep(4)).run()
    assert saved(tmp_path) == [2, 4]
    task = Walk({4: 1})
    assert loop(task, tmp_path).run().rolled_back
    assert task.ran == [4, 2, 3, 4, 5, 6, 7]
    assert "rolling back to step 2" in capsys.readouterr().err


def test_half_the_learning_rate_outlives_a_kill(tmp_path):
    task = Walk({4: 1, 5: 1, 6: 1})
    task.kill_in = 7
    with pytest.raises(Kill):
        loop(task, tmp_path).run()
    resumed = Walk()
    assert loop(resumed, tmp_path).run().rolled_back
    assert (resumed.ran, resumed.scale) == ([6, 7], 0.5)


def test_the_second_divergence_ends_the_run_with_the_hint(tmp_path):
    task = Walk({4: 2, 5: 2, 6: 2})
    with pytest.raises(DivergedError, match=r"walk: training diverged at step 7 of 8: .* a bad step") as caught:
        loop(task, tmp_path).run()
    assert caught.value.hint == "walk more slowly"
    assert task.ran == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6]


def test_a_run_in_which_nothing_was_learned_is_not_finished(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_cli.training.loop.BAD_STEPS_IN_A_ROW", 100)
    with pytest.raises(DivergedError, match="nothing was learned in any step: a bad step"):
        loop(Walk(dict.fromkeys(range(STEPS), 9)), tmp_path).run()


def test_weights_that_are_not_finite_are_never_saved_and_roll_back(tmp_path):
    task = Walk()
    plain = task.step

    def poisoned(step: int, watch) -> StepReport:
        report = plain(step, watch)
        if step == 3 and task.scale == 1.0:
            task.weight.data.fill_(float("nan"))
        return report

    task.step = poisoned
    assert loop(task, tmp_path).run().rolled_back
    assert task.ran == [0, 1, 2, 3, 2, 3, 4, 5, 6, 7]


def test_a_task_that_ends_early_is_saved_and_stays_ended(tmp_path):
    loop(Walk(ends_after=5), tmp_path).run()
    assert saved(tmp_path)[-1] == 5
    again = Walk(ends_after=5)
    loop(again, tmp_path).run()
    assert again.ran == []
