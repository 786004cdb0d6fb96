"""The training loop of all stages: resume, step, roll back, save, stop.

A stage says what one step does (`TrainingTask`); everything around a step is here, once:

  begin      seed, or resume from the newest whole checkpoint
  step       count steps that were skipped because something was not finite
  roll back  after three such steps in a row, once, to the last regular checkpoint, with half the learning rate
  save       weights, optimizer, random states, loop state and log position, every `checkpoint_steps` and at the end;
             a copy of them may be written in the background, until the next save or the end of the run
  stop       on a signal to any process, or because the task says so, after saving the step that was running; without
             the server that samples, after saving the step before

A killed run ends with the bytes of an uninterrupted one, provided that the task's steps are functions of the step, the
weights, the optimizer, the task's state and the global random generators.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_cli import progress
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.errors import DivergedError, RLHFError, ServerLostError
from rlhf_cli.files import write_whole
from rlhf_cli.training.checkpoint.background import BackgroundWriter
from rlhf_cli.training.checkpoint.store import (
    Checkpoint,
    latest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from rlhf_cli.training.distributed import DistributedStop
from rlhf_cli.training.monitoring.metrics_log import MetricsLog
from rlhf_cli.training.monitoring.run_logger import ENDED, RunLogger
from rlhf_cli.training.monitoring.step_lines import read_rows
from rlhf_cli.training.monitoring.timing_log import TIMING, timing_row
from rlhf_cli.training.random_state import random_states, restore_random_states, seed_everything
from rlhf_cli.training.task import StepReport, TrainingTask
from rlhf_cli.training.timing import StepWatch

_RECALLED = 5
"""Steps of an earlier attempt, the last ones, whose times tell how long a step takes."""
BAD_STEPS_IN_A_ROW = 3
"""Training has diverged after this many consecutive steps with a skipped optimizer step."""


@dataclass
class LoopState:
    """What the loop remembers from step to step; part of every checkpoint.

    Attributes:
        skipped_steps: optimizer steps that were skipped, those of steps that were rolled back included.
        bad_steps: consecutive steps, up to now, with a skipped optimizer step.
        sound_steps: steps in which an optimizer step was taken.
        anchor: step of the last regular checkpoint, to which a divergence rolls back. A checkpoint that only a signal
            caused is not an anchor: where a run was stopped must not change where it rolls back to.
        rolled_back: whether training rolled back, after which it has half the learning rate.
    """

    skipped_steps: int = 0
    bad_steps: int = 0
    sound_steps: int = 0
    anchor: int = 0
    rolled_back: bool = False


class TrainingLoop:
    """Runs the steps of a task.

    Args:
        task: what to train.
        label: name of the training, for the progress bar and messages.
        steps: number of steps.
        checkpoint_steps: steps between two regular checkpoints.
        seed: seed of the global random generators.
        work: folder of checkpoints, metrics and samples.
        stop: asked after every step.
        processes: the processes of the run, all of which run the same loop.
        hint: what to do about a divergence that has no hint of its own.
        keep_checkpoints: newest checkpoints that are kept; the anchor is kept too.
        shows_samples: whether the task shows samples.
        log: makes the metrics log, from the arguments of `MetricsLog`.
        watch: times the steps; it may have timed an evaluation before.
        peak: operations per second that the device of one process can do; None is not known.
        checkpoint_async: write checkpoints in the background, see `BackgroundWriter`.

    Attributes:
        state: what the loop remembers.
        watch: see above.
        writer: of checkpoints in the background; None if they are written before the training goes on.
    """

    def __init__(
        self,
        task: TrainingTask,
        *,
        label: str,
        steps: int,
        checkpoint_steps: int,
        seed: int,
        work: Path,
        stop: StopRequest,
        processes: ProcessGroup,
        hint: str,
        keep_checkpoints: int = 2,
        shows_samples: bool = False,
        log: Callable[..., MetricsLog] = MetricsLog,
        watch: StepWatch | None = None,
        peak: float | None = None,
        checkpoint_async: bool = False,
    ) -> None:
        self.writer = BackgroundWriter(processes) if checkpoint_async else None
        self.state = LoopState()
        self.watch = watch or StepWatch(guess=task.phases, alike=task.alike)
        self._peak = None if peak is None else peak * processes.count
        self._task, self._label, self._steps = task, label, steps
        self._checkpoint_steps, self._keep_checkpoints = checkpoint_steps, keep_checkpoints
        self._seed, self._work, self._hint = seed, work, hint
        self._stop, self._processes = DistributedStop(stop, processes), processes
        self._shows_samples, self._make_log = shows_samples, log
        self._logger = RunLogger(None, after_step=0)
        self._is_cut_short = False

    def run(self) -> LoopState:
        """Run all steps, from the newest whole checkpoint if there is one; the task then has its final weights.

        Raises:
            DiskError: a checkpoint could not be written; the one before is intact.
            DivergedError: training diverged again after a roll-back, or had no checkpoint to roll back to.
            DetectorStopError: a detector of the task stopped the run; the last step is saved.
            ServerLostError: a step could not sample; the step before is saved.
        Interrupted: a signal arrived; the step that was running is saved.
        """
        resumed = self._resume()
        if self._processes.is_main:
            (self._work / ENDED).unlink(missing_ok=True)
        try:
            with progress.task(self._label, self._steps, "steps", done=resumed or 0) as bar:
                self.watch.show_on(bar)
                self._run_steps(resumed, bar)
                self._wait_for_writer()
        except Exception as error:
            if self.writer is not None:
                self.writer.finish()
            self._record_end(error)
            raise
        finally:
            self.watch.show_on(None)
            self._logger.close()
        return self.state

    def _record_end(self, error: Exception) -> None:
        """Write why the run ended, for `rlhf diagnose`. Where even that cannot be written, `error` says why."""
        if self._processes.is_main:
            known = isinstance(error, RLHFError)
            told = {"error": type(error).__name__, "message": error.message if known else str(error)}
            with contextlib.suppress(OSError):
                write_whole(self._work / ENDED, json.dumps(told | {"hint": error.hint if known else None}))

    def _run_steps(self, resumed: int | None, bar: progress.Task) -> None:
        watch = self.watch
        if resumed is None:
            self._task.before_first_step(self._logger, watch)
            self._save(0)  # what a divergence in the first steps rolls back to
            self._logger.time(0, timing_row(watch.end_step()))
        elif self._processes.is_main:
            earlier = [row for row in read_rows(self._work / TIMING) if 0 < row["step"] <= resumed]
            watch.recall([row for row in earlier if "time/step" in row][-_RECALLED:])
        step = resumed or 0
        if self._task.halt is not None:
            raise self._task.halt
        if self._is_cut_short:
            self._end_at(step)
        while step < self._steps and not self._task.has_ended:
            if self.writer is not None:
                self.writer.check()
            watch.begin_step(self._steps - step)
            try:
                report = self._step(step)
                self._finish_step(step + 1, report)
            except DivergedError as error:
                anchor = self._roll_back(step + 1, error)
                watch.end_step()
                bar.back(step - anchor)
                step = anchor
                continue
            step += 1
            bar.advance(note=report.note)
            halt = self._task.halt
            if self._stop.requested or halt is not None:
                if not self._is_due(step):
                    self._save(step, ends=True)
                self._wait_for_writer(says=True)
                self._stop.check()
            if halt is not None:
                raise halt

    def _end_at(self, step: int) -> None:
        """Make a step the last one that was not when it was taken: the number of steps was lowered to those done."""
        if not self.state.sound_steps:
            raise DivergedError("nothing was learned in any step", hint=self._hint)
        if added := self._task.after_last_step(step, self._logger, self.watch):
            self._logger.amend(step, added)
        self._save(step)
        self.watch.end_step()

    def _step(self, step: int) -> StepReport:
        """Run a step. Where it loses the server that samples, nothing of it was trained: the steps before are saved."""
        try:
            return self._task.step(step, self.watch)
        except ServerLostError:
            if not self._is_due(step):
                self._save(step, ends=True)
            self._wait_for_writer()
            progress.say(f"{self._label}: {step:,} of {self._steps:,} steps are saved")
            raise

    def _finish_step(self, step: int, report: StepReport) -> None:
        self._count(step, report)
        self._task.after_step(step, report, self._logger, self.watch)
        self._logger.write(step, report.metrics, report.histograms)
        if self._is_due(step):
            self._save(step)
        seconds = self.watch.end_step()
        self._logger.time(step, timing_row(seconds, report.work, episodes=report.episodes, peak=self._peak))

    def _count(self, step: int, report: StepReport) -> None:
        """Count skipped optimizer steps; raise `DivergedError` where there are too many."""
        state = self.state
        state.skipped_steps += report.skipped
        state.bad_steps = state.bad_steps + 1 if report.skipped else 0
        state.sound_steps += report.skipped < report.of
        if state.bad_steps >= BAD_STEPS_IN_A_ROW:
            first = step - state.bad_steps + 1
            raise DivergedError(
                f"optimizer steps were skipped in steps {first:,} to {step:,}: {report.fault}", hint=report.hint
            )
        if step == self._steps and not state.sound_steps:
            raise DivergedError(f"nothing was learned in any step: {report.fault}", hint=report.hint)

    def _is_due(self, step: int) -> bool:
        """Whether a regular checkpoint is due: never among bad steps, so that a roll-back goes to before them."""
        return self._is_last(step) or (self.state.bad_steps == 0 and step % self._checkpoint_steps == 0)

    def _is_last(self, step: int) -> bool:
        return step == self._steps or self._task.has_ended

    def _wait_for_writer(self, *, says: bool = False) -> None:
        """Wait for the checkpoint that is written in the background; all processes call this together."""
        if self.writer is not None and self.writer.is_writing:
            with self.watch.phase("checkpoint", "saving"):
                self.writer.wait(says=says)

    def _save(self, step: int, *, ends: bool = False) -> None:
        """Write a checkpoint; all processes call this together.

        Args:
            step: steps done.
            ends: the run ends with it, so there is nothing to go on with while it is written.
        """
        if self._is_due(step):
            self.state.anchor = step
        task, processes = self._task, self._processes
        state = {
            "loop": asdict(self.state),
            "task": task.extra_state(),
            "random": random_states(processes),
            "log": self._logger.position(),
            "steps": self._steps,
        }
        is_last = ends or self._is_last(step)
        if is_last:
            self._wait_for_writer(says=ends)
        with self.watch.phase("checkpoint", "saving"):
            save_checkpoint(
                self._work,
                step,
                task.weights() | optimizer_tensors(task.optimizer, "optimizer"),
                state,
                keep=self._keep_checkpoints,
                protected={self.state.anchor, *task.kept_steps},
                processes=processes,
                writer=None if is_last else self.writer,
            )

    def _resume(self) -> int | None:
        """Restore the newest whole checkpoint; returns its step, or None where there is none."""
        checkpoint = latest_checkpoint(self._work, processes=self._processes)
        if checkpoint is None:
            seed_everything(self._seed, self._processes.index)
            self._open_log(-1, None)  # drop all that an earlier attempt wrote
            return None
        self._restore(checkpoint)
        if checkpoint.step:
            progress.say(f"{self._label}: resuming from step {checkpoint.step:,} of {self._steps:,}")
        if checkpoint.step == self._steps and not self._task.has_ended:
            begun_with = checkpoint.state.get("steps")
            self._is_cut_short = begun_with is not None and begun_with > self._steps
            if begun_with is None:  # saved by an earlier version
                progress.say(f"{self._label}: whether this step was the last is not known; it is not evaluated again")
        return checkpoint.step

    def _roll_back(self, step: int, error: DivergedError) -> int:
        """Restore the last regular checkpoint and return its step, once; the second time, raise `DivergedError`."""
        self._wait_for_writer()
        checkpoint = None
        if not self.state.rolled_back:
            checkpoint = latest_checkpoint(self._work, up_to=self.state.anchor, processes=self._processes)
        if checkpoint is None:
            raise DivergedError(
                f"{self._label}: training diverged at step {step:,} of {self._steps:,}: {error.message}",
                hint=error.hint or self._hint,
            ) from error
        progress.warn(
            f"step {step:,}: {error.message}; rolling back to step {checkpoint.step:,} with half the learning rate "
            "(done at most once)"
        )
        skipped = self.state.skipped_steps
        self._logger.close()
        self._restore(checkpoint)
        # The same steps at the same rate would end the same way.
        self.state.rolled_back, self.state.bad_steps, self.state.skipped_steps = True, 0, skipped
        self._task.scale_learning_rates(0.5)
        return checkpoint.step

    def _restore(self, checkpoint: Checkpoint) -> None:
        tensors, state = checkpoint.tensors, checkpoint.state
        self._task.load_weights(tensors)
        restore_optimizer(self._task.optimizer, tensors, "optimizer")
        self._task.load_extra_state(state["task"])
        self.state = LoopState(**state["loop"])
        self._task.scale_learning_rates(0.5 if self.state.rolled_back else 1.0)
        restore_random_states(state["random"], self._processes, self._seed)
        self._open_log(checkpoint.step, state["log"])

    def _open_log(self, after_step: int, position: dict[str, Any] | None) -> None:
        self._logger = RunLogger(
            self._work if self._processes.is_main else None,
            after_step=after_step,
            position=position,
            shows_samples=self._shows_samples,
            make=self._make_log,
        )
