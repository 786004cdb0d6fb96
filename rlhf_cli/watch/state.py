"""What a run is doing, from its files alone: those of a process on this machine, or of another one's folder."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ValidationError

from rlhf_cli.durations import format_clock
from rlhf_cli.pipeline.diagnosis import check_run_directory, findings_of
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.pipeline.stage_states import StageState, states_of
from rlhf_cli.plain_text import printable
from rlhf_cli.stages.registry import REGISTRY
from rlhf_cli.training.monitoring.health.findings import Finding
from rlhf_cli.training.monitoring.run_files import DETECTIONS, METRICS, SAMPLES
from rlhf_cli.training.monitoring.step_lines import readable_rows

Row = dict[str, Any]
Shown = Annotated[str, AfterValidator(printable)]
"""Text that another process wrote, without terminal control characters."""

_SILENT = 300.0
"""Seconds without progress after which a run of another machine has ended: hashing a large model takes minutes."""
FRESH = 1.0
"""Seconds for which one look serves all who ask: several pages, or several requests of one."""


class RunningTask(BaseModel):
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

    label: Shown
    done: int
    total: int
    unit: Shown
    doing: Shown = ""
    seconds_left: float | None = None
    is_guess: bool = False

    @property
    def text(self) -> str:
        """All of it in a line, without the label."""
        about = "~" if self.is_guess else ""
        left = "" if self.seconds_left is None else f"{about}{format_clock(self.seconds_left)} left"
        count = f"{self.done:,} of {self.total:,} {self.unit}"
        return ", ".join(part for part in (count, left, self.doing) if part)


class _Progress(BaseModel):
    """The progress record of a run, see `running_tasks.recorded`; one that cannot be read has no time."""

    host: str = ""
    time: float = 0.0
    stage: str | None = None
    tasks: tuple[RunningTask, ...] = ()

    @staticmethod
    def read(path: Path) -> _Progress:
        try:
            found = _Progress.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return _Progress()
        return found if found.stage in (None, *REGISTRY) else _Progress()


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
        states: stage -> state, of those that have begun or are to come, in order.
        stage: the running one, else the last one with metrics; None before any stage has begun.
        tasks: what is running in it.
        rows: its `metrics.jsonl`.
        findings: what stands out in them.
        completions: of its fixed prompts.
        results: metric and value, of the evaluation.
    """

    folder: Path
    is_running: bool
    states: dict[str, str]
    stage: str | None
    tasks: Sequence[RunningTask]
    rows: Sequence[Row]
    findings: Sequence[Finding]
    completions: Sequence[Completions]
    results: Sequence[tuple[str, str]] = ()

    @property
    def is_finished(self) -> bool:
        """Whether all stages of its recipe, and those that have begun, are finished."""
        return not self.is_running and bool(self.states) and set(self.states.values()) == {"finished"}

    @property
    def summary(self) -> str:
        """The state of each stage, in a line."""
        found = ", ".join(f"{stage} {state}" for stage, state in self.states.items())
        return found or ("no stage has begun" if self.is_running else "no process is running, and no stage is done")


class Watcher:
    """Looks at the files of a run again and again; only what was added since the last look is read.

    Args:
        folder: run directory.

    Raises:
        UsageError: the folder cannot be a run directory.
    """

    def __init__(self, folder: Path) -> None:
        check_run_directory(folder)
        self._run = RunDirectory(folder)
        self._files: dict[Path, _GrowingFile] = {}
        self._judged: tuple[tuple[Any, ...], list[Finding]] = ((), [])
        self._lock = threading.Lock()
        self._last: LiveRun | None = None
        self._looked = 0.0

    def look(self) -> LiveRun:
        """Return what the run is doing; for a second, what the last call returned."""
        with self._lock:
            if self._last is None or time.monotonic() - self._looked > FRESH:
                try:
                    self._last = self._read()
                except OSError:  # a stage was published, or a checkpoint removed, between two looks at its folder
                    time.sleep(0.2)
                    self._last = self._read()
                self._looked = time.monotonic()
            return self._last

    def _read(self) -> LiveRun:
        run = self._run
        progress = _Progress.read(run.progress_file)
        is_fresh = progress.host != socket.gethostname() and abs(time.time() - progress.time) < _SILENT
        is_running = run.is_in_use or is_fresh
        running = progress.stage if is_running else None
        found = states_of(run, is_running=is_running, running=running)
        with_metrics = [one for one in found.values() if (one.folder / METRICS).is_file()]
        evaluated = found.get("evaluate")
        shown = found.get(running or "") or (with_metrics[-1] if with_metrics else None)
        rows = [] if shown is None else self._rows(shown.folder / METRICS)
        samples = [] if shown is None else self._rows(shown.folder / SAMPLES)
        return LiveRun(
            folder=run.path,
            is_running=is_running,
            states={stage: one.state for stage, one in found.items()},
            stage=None if shown is None else shown.stage,
            tasks=progress.tasks if is_running else (),
            rows=rows,
            findings=[] if shown is None else self._findings(shown, rows),
            completions=_completions(samples),
            results=() if evaluated is None or evaluated.state != "finished" else _results(evaluated),
        )

    def _rows(self, path: Path) -> list[Row]:
        return self._files.setdefault(path, _GrowingFile(path)).read()

    def _findings(self, shown: StageState, rows: Sequence[Row]) -> list[Finding]:
        detections = self._rows(shown.folder / DETECTIONS)
        key = (shown.folder, shown.state, len(rows), rows[-1:], len(detections))
        if key != self._judged[0]:
            found = [one for one in findings_of(shown, rows, detections) if one.severity != "fine"]
            self._judged = key, [dataclasses.replace(one, seen=printable(one.seen)) for one in found]
        return self._judged[1]


class _GrowingFile:
    """The rows of a file of one JSON object per line that another process appends to, or replaces."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._clear(None)

    def _clear(self, file: tuple[int, int] | None) -> None:
        self._file, self._bytes = file, 0
        self._rows: list[Row] = []

    def read(self) -> list[Row]:
        """Return all rows; of a file that grew, only the new lines are read."""
        try:
            with self._path.open("rb") as file:
                stat = self._path.stat()
                if self._file != (stat.st_dev, stat.st_ino) or stat.st_size < self._bytes:
                    self._clear((stat.st_dev, stat.st_ino))
                file.seek(self._bytes)
                added = file.read()
        except FileNotFoundError:
            self._clear(None)
            return []
        whole = added[: added.rfind(b"\n") + 1]
        self._bytes += len(whole)
        self._rows = [*self._rows, *readable_rows(whole)] if whole else self._rows
        return self._rows


def read_live(folder: Path) -> LiveRun:
    """Return the state of a run at one moment; see `Watcher`."""
    return Watcher(folder).look()


def _completions(rows: Sequence[Row]) -> list[Completions]:
    """Return the first and the newest completion of each prompt."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if isinstance(row.get("completion"), str) and isinstance(row.get("prompt"), str):
            found.setdefault(row["prompt"], []).append(row)
    return [_first_and_last(prompt, own[0], own[-1]) for prompt, own in found.items()]


def _results(evaluated: StageState) -> list[tuple[str, str]]:
    assert evaluated.manifest is not None
    return [(printable(metric), printable(value)) for metric, value in evaluated.manifest.summary]


def _first_and_last(prompt: str, first: Row, last: Row) -> Completions:
    return Completions(prompt, first["step"], first["completion"], last["step"], last["completion"], last.get("score"))
