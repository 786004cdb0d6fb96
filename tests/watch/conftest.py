"""A run that goes on, without training anything."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlhf_cli.pipeline.run_directory import RunDirectory
from tests.labeling.web.conftest import browser as browser
from tests.report.conftest import HOSTILE, Runs

PROMPTS = ("How can I bake bread?", HOSTILE)


class PPORun:
    """A run whose PPO is at step 30 of 60, with files as the stages write them."""

    def __init__(self, folder: Path) -> None:
        self.folder = Runs(folder).write("mine")
        shutil.rmtree(self.folder / "evaluate")
        shutil.rmtree(self.folder / "ppo")
        self.work = self.folder / ".ppo.work"
        self.work.mkdir()
        self.steps(30)

    def steps(self, count: int, **metrics: float) -> None:
        """Write metrics and completions of that many steps."""
        rows = [self._row(step) | metrics for step in range(1, count + 1)]
        self._write("metrics.jsonl", rows)
        shown = [
            {
                "step": step,
                "prompt": prompt,
                "completion": f"Let it rise {step} hours. {HOSTILE[:40]}",
                "score": 0.1 * step,
            }
            for step in range(0, count + 1, 10)
            for prompt in PROMPTS
        ]
        self._write("samples.jsonl", shown)

    def _row(self, step: int) -> dict[str, float]:
        row = {
            "step": step, "objective/scores": 1 + math.log(step), "objective/kl": 0.1 * step, "length/mean": 30.0,
            "policy/entropy_avg": 2.0 - 0.01 * step, "policy/clipfrac_avg": 0.1, "val/explained_variance": 0.4,
        }  # fmt: skip
        return row | (
            {} if step % 10 else {"eval/objective/scores": 1 + math.log(step), "eval/objective/kl": 0.1 * step}
        )

    def _write(self, name: str, rows: list[dict]) -> None:
        (self.work / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def progress(
        self, *, age: float = 0.0, host: str = "another", stage: str | None = "ppo", **changes: object
    ) -> None:
        """Write the progress record of a process that wrote it `age` seconds ago, by default of another machine."""
        shown = {
            "label": "ppo", "done": 30, "total": 60, "unit": "steps", "doing": "updates", "seconds_left": 65.2,
            "is_guess": False,
        }  # fmt: skip
        content = {"host": host, "time": time.time() - age, "stage": stage, "tasks": [shown]} | changes
        (self.folder / ".progress.json").write_text(json.dumps(content))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the lock of the run directory, as the process of a run does."""
        with RunDirectory(self.folder).lock():
            yield


@pytest.fixture
def ppo_run(tmp_path: Path) -> PPORun:
    """A run whose PPO is at step 30 of 60; no process works on it."""
    return PPORun(tmp_path)
