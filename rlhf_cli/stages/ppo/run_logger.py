"""What a PPO run writes as it goes: metrics and samples, in the process that writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cli.training.monitoring.metrics_log import MetricsLog
from rlhf_cli.training.monitoring.samples import SampleLog, ShownAnswer


@dataclass(frozen=True)
class StepReport:
    """What a step was like.

    Attributes:
        metrics: name -> figure.
        histograms: name -> values.
        fault: why nothing was learned from it, or "".
    """

    metrics: dict[str, float]
    histograms: dict[str, list[float]]
    fault: str = ""


class RunLogger:
    """Metrics and samples of a run; nothing in processes that do not write.

    Args:
        log: of metrics.
        samples: where some are shown.
    """

    def __init__(self, log: MetricsLog | None = None, samples: SampleLog | None = None) -> None:
        self._log, self._samples = log, samples

    def write(self, step: int, report: StepReport) -> None:
        """Keep the figures of a step."""
        if self._log is not None:
            self._log.write(step, report.metrics, report.histograms)

    def show(self, step: int, rows: Sequence[ShownAnswer]) -> None:
        """Keep and print answers given after `step` steps."""
        if self._samples is not None:
            self._samples.show(step, rows)

    def position(self) -> dict[str, Any] | None:
        """Makes what was written durable, and says how far it goes."""
        return None if self._log is None else self._log.position()

    def close(self) -> None:
        """Make everything durable."""
        for log in (self._log, self._samples):
            if log is not None:
                log.close()
