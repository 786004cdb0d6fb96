"""What a run is doing, from its files alone: those of a process on this machine, or a folder of another one."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.pipeline.diagnosis import StageDiagnosis, check_run_directory, diagnose_stages
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.progress import format_clock
from rlhf_cli.training.monitoring.health.findings import Finding
from rlhf_cli.training.monitoring.run_files import METRICS, SAMPLES
from rlhf_cli.training.monitoring.step_lines import read_rows

Row = Mapping[str, Any]

_SILENT = 300.0
"""Seconds without progress after which a run whose lock is not seen here has ended: loading a model takes minutes."""


@dataclass(frozen=True)
class RunningTask:
    """What a progress bar of the run shows.

    Attributes:
        label: of the task.
        done: units that are done.
        total: units in all.
        unit: their name, in the plural.
        doing: what is being done now, how fast, and the note of the bar.
        seconds_left: None if not known yet.
        is_guess: no unit has ended yet.
    """

    label: str
    done: int
    total: int
    unit: str
    doing: str
    seconds_left: float | None
    is_guess: bool

    @property
    def text(self) -> str:
        """All of it in a line, without the label."""
        left = (
            "" if self.seconds_left is None else f"{'~' if self.is_guess else ''}{format_clock(self.seconds_left)} left"
        )
        count = f"{self.done:,} of {self.total:,} {self.unit}"
        return ", ".join(part for part in (count, left, self.doing) if part)


@dataclass(frozen=True)
class Completions:
    """Completions of one fixed prompt.

    Attributes:
        prompt: as text.
        first_step: step after which the first one was sampled.
        first: the first completion.
        last_step: step after which the newest one was sampled.
        last: the newest completion.
        score: its reward; None if it is not finite.
    """

    prompt: str
    first_step: int
    first: str
    last_step: int
    last: str
    score: float | None


@dataclass(frozen=True)
class LiveRun:
    """A run at one moment.

    Attributes:
        folder: run directory.
        is_running: whether a process works on it.
        stages: that have begun, in order.
        stage: the running one, else the last one with metrics; None before any stage has begun.
        tasks: what is running in it.
        rows: its `metrics.jsonl`.
        completions: of its fixed prompts.
    """

    folder: Path
    is_running: bool
    stages: Sequence[StageDiagnosis]
    stage: str | None
    tasks: Sequence[RunningTask]
    rows: Sequence[Row]
    completions: Sequence[Completions]

    @property
    def findings(self) -> Sequence[Finding]:
        """What stands out in the stage that is shown."""
        found = [finding for one in self.stages if one.stage == self.stage for finding in one.findings]
        return [finding for finding in found if finding.severity != "fine"]

    @property
    def summary(self) -> str:
        """Whether it is running, and the state of each stage, in a line."""
        states = [f"{one.stage} {one.state}" for one in self.stages]
        begun = {one.stage for one in self.stages}
        if self.is_running and self.stage is not None and self.stage not in begun:
            states.append(f"{self.stage} running")
        return ", ".join(states) or ("no stage has begun" if self.is_running else "nothing is running, nothing is done")


def read_live(folder: Path) -> LiveRun:
    """Read the state of a run.

    Raises:
        UsageError: the folder cannot be a run directory.
    """
    check_run_directory(folder)
    run = RunDirectory(folder)
    progress = _progress(run.progress_file)
    is_fresh = time.time() - progress.get("time", 0.0) < _SILENT
    is_running = run.is_in_use or is_fresh
    stages = diagnose_stages(folder, is_running=is_running)
    with_metrics = [one.stage for one in stages if one.steps]
    stage = progress.get("stage") if is_running else None
    shown = stage or (with_metrics[-1] if with_metrics else None)
    files = _files(run, shown) if shown is not None else None
    return LiveRun(
        folder=folder,
        is_running=is_running,
        stages=stages,
        stage=shown,
        tasks=[RunningTask(**one) for one in progress.get("tasks", ())] if is_running else (),
        rows=[] if files is None else read_rows(files / METRICS),
        completions=[] if files is None else _completions(read_rows(files / SAMPLES)),
    )


def _progress(path: Path) -> dict[str, Any]:
    """Return the progress record; empty without one, or if it cannot be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _files(run: RunDirectory, stage: str) -> Path:
    """Return the folder with the files that a stage writes as it runs, or wrote."""
    return run.work(stage) if (run.work(stage) / METRICS).exists() else run.artifact(stage)


def _completions(rows: Sequence[Row]) -> list[Completions]:
    """Return the first and the newest completion of each prompt."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if isinstance(row.get("completion"), str) and isinstance(row.get("prompt"), str):
            found.setdefault(row["prompt"], []).append(row)
    return [
        Completions(
            prompt, own[0]["step"], own[0]["completion"], own[-1]["step"], own[-1]["completion"], own[-1].get("score")
        )
        for prompt, own in found.items()
    ]
