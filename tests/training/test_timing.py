"""Where the time of a step goes: phases by a fake clock, and the time left that follows from them."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_cli import progress
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.training.loop import TrainingLoop
from rlhf_cli.training.monitoring.timing_log import Work
from rlhf_cli.training.task import StepReport, TrainingTask
from rlhf_cli.training.timing import StepEstimate, StepWatch
from tests.stops import NeverStop

GUESS = {"rollout": 10.0, "scoring": 1.0, "passes": 3.0, "update": 6.0}


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def run_step(estimate: StepEstimate, start: float, seconds: dict[str, float], *, rest: float = 0.0) -> float:
    """A whole step from `start` on, with `rest` seconds after its phases; returns when it ends."""
    now = start
    estimate.begin_step(now)
    for phase, spent in seconds.items():
        estimate.begin(phase, now)
        now += spent
        estimate.end(phase, spent)
    estimate.end_step(now + rest)
    return now + rest


def test_the_first_step_is_estimated_from_the_part_of_its_first_phase():
    estimate = StepEstimate(GUESS)
    estimate.begin_step(0.0)
    estimate.begin("rollout", 0.0)
    assert estimate.step_left(1.0) is None, "nothing to go by"
    estimate.move(0.25)
    # A quarter in 5 s is 20 s for a weight of 10, so 2 s per unit of weight: 15 + 2 + 6 + 12 to come.
    assert estimate.step_left(5.0) == pytest.approx(35.0)
    assert estimate.fraction(5.0) == pytest.approx(5 / 40)
    assert estimate.total_left(5.0, steps_after=3) == pytest.approx(35 + 3 * 40)
    assert estimate.is_guess


def test_phases_that_ended_correct_the_guess_of_those_to_come():
    estimate = StepEstimate(GUESS)
    estimate.begin_step(0.0)
    for phase, start, end in (("rollout", 0.0, 10.0), ("scoring", 10.0, 12.0)):
        estimate.begin(phase, start)
        estimate.end(phase, end - start)
    estimate.begin("passes", 12.0)
    # 12 s for a weight of 11: the passes take 3 times that per unit, of which 1 s is over, and the update 6 times.
    assert estimate.step_left(13.0) == pytest.approx(9 * 12 / 11 - 1)


def test_a_phase_tells_how_long_those_take_that_do_the_same_kind_of_work():
    estimate = StepEstimate(GUESS, alike=("passes", "update"))
    estimate.begin_step(0.0)
    for phase, start, end in (("rollout", 0.0, 100.0), ("scoring", 100.0, 101.0)):
        estimate.begin(phase, start)
        estimate.end(phase, end - start)
    estimate.begin("passes", 101.0)
    assert estimate.step_left(101.0) == pytest.approx(9 * 101 / 11), "nothing of that kind is known"
    estimate.move(0.5)
    # Half of the passes in 4 s: 8 s for a weight of 3, so 16 s for the update, however slow the rollout was.
    assert estimate.step_left(105.0) == pytest.approx(4 + 16)
    estimate.end("passes", 6.0)
    estimate.begin("update", 107.0)
    assert estimate.step_left(108.0) == pytest.approx(12 - 1)
    estimate.move(0.25)
    assert estimate.step_left(111.0) == pytest.approx(12.0), "its own speed"


def test_the_steps_of_an_earlier_attempt_count_as_one():
    estimate = StepEstimate(GUESS)
    row = {"time/rollout": 8.0, "time/scoring": 1.0, "time/passes": 3.0, "time/update": 10.0, "time/step": 24.0}
    estimate.recall([row, {**row, "time/rollout": 10.0, "time/step": 26.0}])
    assert estimate.is_guess, "it may have been on another machine"
    estimate.begin_step(0.0)
    estimate.begin("rollout", 0.0)
    assert estimate.step_left(1.0) == pytest.approx(8 + 14)
    assert estimate.total_left(1.0, steps_after=2) == pytest.approx(22 + 2 * 25)
    estimate.end("rollout", 30.0)
    estimate.end_step(45.0)
    assert not estimate.is_guess
    assert estimate.mean_seconds == pytest.approx((25 + 45) / 2)
    empty = StepEstimate(GUESS)
    empty.recall([])
    empty.begin_step(0.0)
    assert empty.total_left(1.0, steps_after=2) is None


def test_later_steps_take_the_mean_of_each_phase():
    estimate = StepEstimate(GUESS)
    now = run_step(estimate, 0.0, {"rollout": 2.0, "scoring": 1.0, "passes": 1.0, "update": 20.0})
    now = run_step(estimate, now, {"rollout": 4.0, "scoring": 1.0, "passes": 3.0, "update": 30.0}, rest=8.0)
    estimate.begin_step(now)
    estimate.begin("rollout", now)
    estimate.move(0.5)
    # Means: 3, 1, 2 and 25. A fast beginning of a phase is no promise: half of it is half of its mean.
    assert estimate.step_left(now + 0.1) == pytest.approx(1.5 + 28)
    # 70 s for two steps, an evaluation or checkpoint of 8 s included.
    assert estimate.total_left(now + 0.1, steps_after=10) == pytest.approx(29.5 + 10 * 35)
    assert not estimate.is_guess
    estimate.end("rollout", 3.0)
    estimate.begin("scoring", now + 3.0)
    assert estimate.step_left(now + 3.4) == pytest.approx(0.6 + 27), "without a part, its mean less what is over"
    assert estimate.step_left(now + 9.0) == pytest.approx(27), "and never less than nothing"


def test_a_phase_that_is_no_part_of_a_step_leaves_the_whole_step_to_its_mean():
    estimate = StepEstimate(GUESS)
    now = run_step(estimate, 0.0, {"rollout": 10.0, "update": 10.0})
    estimate.begin_step(now)
    estimate.begin("eval", now + 12.0)
    assert estimate.step_left(now + 12.0) is None
    assert estimate.total_left(now + 12.0, steps_after=1) == pytest.approx(8 + 20)
    estimate.move(0.25)
    assert estimate.total_left(now + 15.0, steps_after=1) == pytest.approx(9 + 20), "longer than the mean step allows"
    estimate.end("eval", 12.0)
    estimate.begin("eval", now + 30.0)
    assert estimate.total_left(now + 34.0, steps_after=1) == pytest.approx(8 + 20), "as long as the one before"


def test_the_bar_does_not_go_back_while_a_checkpoint_is_saved():
    estimate = StepEstimate({"update": 1.0})
    estimate.begin_step(0.0)
    estimate.begin("checkpoint", 0.0)
    assert estimate.fraction(1.0) == 0.0
    estimate.end("checkpoint", 1.0)
    estimate.begin("update", 1.0)
    estimate.end("update", 4.0)
    estimate.begin("checkpoint", 5.0)
    assert estimate.fraction(6.0) == 1.0


def test_a_phase_inside_another_is_part_of_it(clock):
    watch = StepWatch()
    with watch.phase("eval", "evaluating"):
        clock.wait(1)
        with watch.phase("rollout", "sampling"):
            clock.wait(4)
    with watch.phase("checkpoint", "saving"):
        clock.wait(2)
    assert watch.end_step() == {"eval": 5, "checkpoint": 2, "step": 7}
    watch.begin_step(1)
    with contextlib.suppress(ValueError), watch.phase("rollout", "sampling"):
        clock.wait(3)
        raise ValueError
    clock.wait(1)
    assert watch.end_step() == {"rollout": 3, "step": 4}


def test_cuda_is_waited_for_once_per_phase(monkeypatch, clock):
    waits: list[object] = []

    def synchronize(device) -> None:
        waits.append(device)
        clock.wait(5)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    device = torch.device("cuda:0")
    watch = StepWatch(device)
    watch.begin_step(1)
    for name in ("rollout", "scoring", "passes", "update"):
        with watch.phase(name, name):
            watch.count(3)
            with watch.phase("inner", "inner"):
                watch.count(3)
    assert waits == [device] * 4
    assert watch.end_step()["update"] == 5, "the wait counts as time of the phase that launched the work"


class Timed(TrainingTask):
    """Takes 2 s to sample, 3 s to learn and 0.1 s besides; an evaluation of 7 s after every second step."""

    phases = {"rollout": 1.0, "update": 1.0}  # noqa: RUF012

    def __init__(self, clock: Clock, bad: set[int] | None = None) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1)
        self.clock, self.bad = clock, set(bad or ())

    def scale_learning_rates(self, factor: float) -> None:
        self.bad.clear()

    def weights(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def step(self, step: int, watch: StepWatch | None = None) -> StepReport:
        assert watch is not None
        with watch.phase("rollout", "sampling", total=8):
            for _ in range(2):
                self.clock.wait(1)
                watch.count(4)
        self.clock.wait(0.1)
        with watch.phase("update", "updating"):
            self.clock.wait(3)
        return StepReport(
            {"loss": 1.0},
            "loss 1.0",
            skipped=int(step in self.bad),
            fault="a bad step",
            work={"rollout": Work(8, 40.0), "update": Work(60, 470.0)},
            episodes=2,
        )

    def before_first_step(self, log, watch) -> None:
        with watch.phase("eval", "evaluating"):
            self.clock.wait(7)

    def after_step(self, step, report, log, watch) -> None:
        if step % 2 == 0:
            with watch.phase("eval", "evaluating"):
                self.clock.wait(7)


def train(task: TrainingTask, work: Path, *, steps: int = 4) -> None:
    work.mkdir(exist_ok=True)
    TrainingLoop(
        task,
        label="timed",
        steps=steps,
        checkpoint_steps=2,
        seed=0,
        work=work,
        stop=NeverStop(),
        processes=ProcessGroup(),
        hint="",
        peak=1000.0,
    ).run()


def rows(work: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / "timing.jsonl").read_text().splitlines()]


def test_the_phases_of_a_run_add_up_to_its_steps(tmp_path, clock):
    train(Timed(clock), tmp_path)
    before, *steps = rows(tmp_path)
    assert before == {"step": 0, "time/eval": 7, "time/checkpoint": 0, "time/step": 7}
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    for row in steps:
        parts = sum(value for name, value in row.items() if name.startswith("time/") and name != "time/step")
        assert parts == pytest.approx(row["time/step"], rel=0.05)
        assert row["time/step"] == pytest.approx(12.1 if row["step"] % 2 == 0 else 5.1)
        # Evaluations are no training: 5.1 s of the step count.
        assert row["throughput/tokens_per_second"] == pytest.approx(60 / 3, rel=1e-5)
        assert row["throughput/generated_tokens_per_second"] == pytest.approx(8 / 2, rel=1e-5)
        assert row["throughput/episodes_per_second"] == pytest.approx(2 / 5.1, rel=1e-5)
        assert row["throughput/mfu"] == pytest.approx(510 / 5.1 / 1000, rel=1e-5)
    metrics = (tmp_path / "metrics.jsonl").read_text()
    assert "time/" not in metrics
    assert "throughput/" not in metrics


def test_steps_that_are_rolled_back_have_one_line_each_in_the_end(tmp_path, clock):
    train(Timed(clock, bad={2, 3, 4}), tmp_path, steps=6)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3, 4, 5, 6]


def test_a_resumed_run_appends_and_drops_what_runs_again(tmp_path, clock):
    task = Timed(clock)
    plain = task.step

    def killed(step: int, watch: StepWatch | None = None) -> StepReport:
        if step == 3:
            raise KeyboardInterrupt
        return plain(step, watch)

    task.step = killed
    with pytest.raises(KeyboardInterrupt):
        train(task, tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3]
    clock.wait(1000)
    train(Timed(clock), tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3, 4]
    assert max(row["time/step"] for row in rows(tmp_path)) == pytest.approx(12.1)


def test_a_resumed_run_begins_with_the_times_of_its_earlier_steps(tmp_path, clock, capsys):
    class Slow(Timed):
        killed = True

        def step(self, step: int, watch: StepWatch | None = None) -> StepReport:
            assert watch is not None
            if step == 3 and self.killed:
                raise KeyboardInterrupt
            with watch.phase("rollout", "sampling", total=80):
                for _ in range(8):
                    self.clock.wait(10)
                    watch.count(10)
            with watch.phase("update", "updating"):
                self.clock.wait(40)
            return StepReport({"loss": 1.0})

        def after_step(self, step, report, log, watch) -> None:
            pass

    with pytest.raises(KeyboardInterrupt):
        train(Slow(clock), tmp_path, steps=6)
    capsys.readouterr()
    again = Slow(clock)
    again.killed = False
    train(again, tmp_path, steps=6)
    line = next(line for line in capsys.readouterr().err.splitlines() if "sampling 40/80" in line)
    # 40 s of sampling and 40 s of an update, of which nothing was seen yet, and 3 steps of 120 s.
    assert "sampling 40/80 tokens \u00b7 ~1:20 in step" in line
    assert line.endswith("~7 min 20 s left")


def test_the_part_of_a_rollout_is_that_of_its_time(clock):
    """Completions of 20, 40, ... 200 tokens, a second per token: at half of the time, 73 % of the tokens are drawn."""
    watch = StepWatch(guess={"rollout": 1.0, "update": 1.0})
    seen: list[tuple[float, float | None]] = []

    class Bar:
        def within(self, units, doing, *, left, **_) -> None:
            seen.append((clock.now, left))

    watch.show_on(Bar())  # type: ignore[arg-type]
    watch.begin_step(1)
    with watch.phase("rollout", "sampling"):
        progress = watch.drawing(10, 200, total=10)
        for step in range(1, 201):
            clock.wait(1.0)
            ended = [step] if step % 20 == 0 else []
            progress(len(ended), 10 - (step - 1) // 20, ended)
    # The update is guessed to take as long as the rollout, 200 s.
    ratios = [left / (clock.now - now + 200) for now, left in seen if left is not None and now >= clock.now - 140]
    assert len(ratios) > 100
    assert all(0.7 < ratio < 1.3 for ratio in ratios)


def test_phases_count_what_all_processes_do(clock, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    shown: list[str] = []

    class Bar:
        def within(self, units, doing, *, amount, **_) -> None:
            shown.append(f"{doing} {amount}")

    watch = StepWatch(guess={"rollout": 1.0, "update": 1.0})
    watch.show_on(Bar())  # type: ignore[arg-type]
    watch.begin_step(1)
    with watch.phase("rollout", "sampling"):
        progress = watch.drawing(3, 10, total=10)
        clock.wait(1.0)
        progress(1)
        assert "sampling 3/10 completions" in shown[-1]
    with watch.phase("update", "updating", total=80):
        clock.wait(1.0)
        watch.count(10)
    assert "updating 40/80 tokens" in shown[-1]


def test_a_log_says_within_a_step_what_is_done_and_how_long_it_takes(tmp_path, clock, capsys):
    class Slow(Timed):
        def step(self, step: int, watch: StepWatch | None = None) -> StepReport:
            assert watch is not None
            with watch.phase("rollout", "sampling", total=80):
                for _ in range(8):
                    self.clock.wait(10)
                    watch.count(10)
            with watch.phase("update", "updating"):
                self.clock.wait(80)
            return StepReport({"loss": 1.0})

    train(Slow(clock), tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "timed: 4 steps"
    # 30 of 80 tokens in 30 s: 50 s of sampling are left and 80 s of an update that is guessed to be as long, and
    # three more steps of 160 s.
    assert (
        lines[1]
        == "timed: 0 of 4 steps, sampling 30/80 tokens \u00b7 ~2:10 in step \u00b7 1 tokens/s, ~10 min 10 s left"
    )
    assert any("1 of 4 steps" in line and "about" in line for line in lines)
