"""kill -9 in every phase of PPO: the same command resumes and ends with the bytes of an uninterrupted run.

`benchmarks/kill_resume.py` does the same at many random moments.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.faults.harness import PHASES, SmallRun


def test_killed_in_rollout_scoring_update_and_saving_ends_with_the_same_bytes(whole, parts, tmp_path: Path):
    run = SmallRun.new(tmp_path / "killed", parts)
    chance = random.Random(0)
    fell = []
    for step, phase in enumerate(PHASES, start=1):
        process = run.start()
        run.wait_for(process, phase, step)
        assert process.poll() is None, run.stderr
        # Into the phase, but not out of it: the reward takes 50 ms, an update longer; saving is over at once.
        fell.append(run.kill(process) if phase == "saving" else kill_after(run, process, 0.03 * chance.random()))
    end = run.run()
    assert end.code == 0, end.stderr
    assert "ppo: resuming (it has not finished)" in end.stderr
    assert run.digests() == whole.digests(), f"the kills fell in {fell}"
    assert {"scoring", "update"} <= set(fell)


def test_killed_while_checkpoints_are_written_in_the_background_ends_with_the_same_bytes(whole, parts, tmp_path: Path):
    """`whole` waited for each checkpoint; the last one is never written in the background."""
    run, fell = SmallRun.new(tmp_path / "killed", parts, {"checkpoint_async": True}), []
    for step in (1, 2, 3):
        process = run.start(SLOW_DISK="0.3")
        run.wait_for(process, "saving", step)
        assert process.poll() is None, run.stderr
        run.kill(process)
        fell.append([path.name for path in run.work.glob(".step-*.partial")])
    assert any(fell), "no kill fell into a write, of which only those in the background are slow"
    end = run.run()
    assert end.code == 0, end.stderr
    assert run.digests() == whole.digests(), f"the kills fell in {fell}"


def kill_after(run: SmallRun, process, seconds: float) -> str:
    time.sleep(seconds)
    return run.kill(process)
