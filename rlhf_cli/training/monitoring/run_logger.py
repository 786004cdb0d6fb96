"""The files a training run writes as it goes: metrics, times and samples. Only the main process writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.training.monitoring.detectors.observation import Detection
from rlhf_cli.training.monitoring.metrics_log import MetricsLog
from rlhf_cli.training.monitoring.run_files import DETECTIONS, ENDED, METRICS, SAMPLES
from rlhf_cli.training.monitoring.samples import SampleLog, ShownCompletion
from rlhf_cli.training.monitoring.step_lines import StepLines
from rlhf_cli.training.monitoring.timing_log import TIMING, TimingLog

__all__ = ["DETECTIONS", "ENDED", "METRICS", "SAMPLES", "TIMING", "RunLogger"]


class RunLogger:
    """Metrics, times and samples of a run.

    Args:
        work: folder of the files; None, in processes other than the main one, writes nothing.
        after_step: lines of later steps are dropped, because those steps run again.
        position: what `position` returned when that step was saved; None where nothing was saved.
        shows_samples: whether the run shows samples.
        make: makes the metrics log, from the arguments of `MetricsLog`.
    """

    def __init__(
        self,
        work: Path | None,
        *,
        after_step: int,
        position: Mapping[str, Any] | None = None,
        shows_samples: bool = False,
        make: Callable[..., MetricsLog] = MetricsLog,
    ) -> None:
        self._log = self._samples = self._times = self._detections = None
        self._work, self._after_step = work, after_step
        if work is not None:
            self._log = make(work / METRICS, after_step=after_step, position=position)
            self._times = TimingLog(work, after_step=after_step)
            if (work / DETECTIONS).exists():
                self._detections = StepLines(work / DETECTIONS, after_step=after_step, sparse=True)
            self._samples = SampleLog(work / SAMPLES, after_step=after_step) if shows_samples else None

    def write(
        self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        """Append the metrics of a step."""
        if self._log is not None:
            self._log.write(step, metrics, histograms)

    def amend(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to those of `step`, the last step that was written."""
        if self._log is not None:
            self._log.amend(step, metrics)

    def time(self, step: int, row: Mapping[str, float]) -> None:
        """Append the times of a step, whose metrics were written; see `timing_row`."""
        if self._log is not None and self._times is not None:
            self._times.write(step, row)
            self._log.track(step, {name: row[name] for name in row if name.startswith(("time/", "throughput/"))})

    def show(self, step: int, rows: Sequence[ShownCompletion]) -> None:
        """Append and print completions sampled after `step` steps."""
        if self._samples is not None:
            self._samples.show(step, rows)

    def detect(self, found: Sequence[Detection]) -> None:
        """Append detectors that changed their state."""
        if self._work is None or not found:
            return
        if self._detections is None:
            self._detections = StepLines(self._work / DETECTIONS, after_step=self._after_step, sparse=True)
        for detection in found:
            self._detections.append(detection.as_json())
        self._detections.sync()

    def position(self) -> dict[str, Any] | None:
        """Make what was written durable and return how far it goes, for a checkpoint."""
        return None if self._log is None else self._log.position()

    def close(self) -> None:
        """Make what was written durable and close the files; a second call does nothing."""
        for log in (self._log, self._times, self._samples, self._detections):
            if log is not None:
                log.close()
