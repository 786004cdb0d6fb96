"""Signals in every phase: the current step is finished and saved, the exit code names the signal, a run resumes."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from tests.faults.harness import STEPS, SmallRun


def signaled(run: SmallRun, phase: str, step: int, signum: int):
    """The run in this process, which gets a signal in a phase of a step."""

    class Itself:
        returncode = None

        def poll(self):
            return 1 if over.is_set() else None

        def send_signal(self, signum: int) -> None:
            os.kill(os.getpid(), signum)

    over = threading.Event()

    def watch() -> None:
        run.wait_for(Itself(), phase, step)
        if not over.is_set():
            os.kill(os.getpid(), signum)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return run.run_here()
    finally:
        over.set()
        watcher.join()


@pytest.mark.parametrize(
    ("phase", "signum", "code"),
    [
        ("rollout", signal.SIGTERM, 143),
        ("scoring", signal.SIGINT, 130),
        ("update", signal.SIGUSR1, 143),
        ("saving", signal.SIGTERM, 143),
    ],
)
def test_a_signal_in_any_phase_saves_the_step_and_ends(halfway, parts, tmp_path: Path, phase, signum, code):
    run = SmallRun.new(tmp_path / "signaled", parts)
    end = signaled(run, phase, 2, signum)
    assert end.code == code, end.stderr
    assert f"stopped by {signum.name}; finished steps and batches are saved" in end.stderr
    # A checkpoint is there a moment before the loop looks for signals: then nothing more is done, or one step more.
    assert run.newest() in {"rollout": (1, 2), "saving": (2, 3)}.get(phase, (2,))
    if run.newest() == 2:
        assert run.stopped() == halfway.stopped()


def test_resuming_where_a_pass_over_the_prompts_ends_trains_on_in_the_same_order(parts, tmp_path: Path):
    """Each step is one whole pass over the prompts, so every checkpoint lies at the end of one (trap 25)."""
    passes = {"ppo.prompts_per_step": 7, "ppo.epochs": 1}
    whole, stopped = (SmallRun.new(tmp_path / name, parts, passes) for name in ("whole", "stopped"))
    assert whole.run_here().code == 0
    assert stopped.run_here(FAULT="signal:2").code == 143
    end = stopped.run_here()
    assert end.code == 0, end.stderr
    assert stopped.events() == [f"{word} {step}" for step in (3, 4) for word in ("scoring", "scored")], "it trained"
    assert len((stopped.run_dir / "ppo/metrics.jsonl").read_text().splitlines()) == STEPS
    assert stopped.digests() == whole.digests()
