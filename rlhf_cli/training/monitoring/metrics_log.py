"""The metrics file of a run: one JSON object per step, under TRL's names where TRL has one; trackers get the same.

{"step": 3, "objective/kl": 1.2, ..., "histograms": {"length": {"edges": [...], "counts": [...]}}}
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rlhf_cli.training.monitoring.step_lines import StepLines, read_rows

if TYPE_CHECKING:
    from rlhf_cli.training.monitoring.trackers import Trackers

__all__ = ["BINS", "Histogram", "MetricsLog", "histogram_of", "read_rows"]

BINS = 16
"""Largest number of bins of a histogram."""


class MetricsLog:
    """Appends to a `metrics.jsonl`; a resumed run continues after the step it resumes from.

    As a context manager, it closes itself on leaving.

    Args:
        path: the file.
        after_step: lines of later steps are dropped, because those steps run again.
        position: what `position` returned when a checkpoint was saved; see `StepLines`.
        trackers: get all metrics too.
    """

    def __init__(
        self,
        path: Path,
        *,
        after_step: int = 0,
        position: Mapping[str, Any] | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        self._lines = StepLines(path, after_step=after_step, position=position)
        self._trackers = trackers
        if trackers is not None:
            lines = self._lines
            trackers.begin(after_step=after_step, kept_step=lines.kept_step, last_step=lines.last_step)

    def write(
        self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        """Append one line; values that are not finite are written as null, since JSON has no NaN.

        Args:
            step: 1-based.
            metrics: name -> value.
            histograms: name -> values, of which bins and counts are written; see `histogram_of`.
        """
        row: dict[str, Any] = {"step": step} | _plain(metrics)
        binned = {name: histogram_of(values) for name, values in (histograms or {}).items()}
        if binned:
            row["histograms"] = {name: histogram.as_json() for name, histogram in binned.items()}
        self._lines.append(row)
        if self._trackers is not None:
            self._trackers.write(step, _finite(metrics), binned)

    def amend(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics to those of `step`, the last step that was written."""
        self._lines.amend(step, _plain(metrics))
        self.track(step, metrics)

    def track(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send finite metrics of a step to the trackers alone: the file holds what is the same in every run."""
        if self._trackers is not None:
            self._trackers.write(step, _finite(metrics), {})

    def position(self) -> dict[str, Any]:
        """Make what was written durable and return how far it goes, for a checkpoint: `bytes` and their `sha256`."""
        self.sync()
        return self._lines.position()

    def sync(self) -> None:
        """Make what was written durable."""
        self._lines.sync()
        if self._trackers is not None:
            self._trackers.flush()

    def close(self) -> None:
        """Make what was written durable and close the file; a second call does nothing."""
        self._lines.close()
        if self._trackers is not None:
            self._trackers.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _plain(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Return metrics as JSON has them."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


@dataclass(frozen=True)
class Histogram:
    """Counts of values between edges.

    Attributes:
        edges: bin edges, rising, one more than there are counts; empty without values. A bin includes its lower edge
            and excludes its upper edge; the last bin includes both.
        counts: number of values per bin.
        non_finite: number of values that were NaN or infinite; no bin has them.
        total: sum of the values in bins.
        squares: sum of their squares.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    non_finite: int = 0
    total: float = 0.0
    squares: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the form in `metrics.jsonl`: `edges`, `counts`, and `non_finite` where there are any."""
        plain: dict[str, Any] = {"edges": list(self.edges), "counts": list(self.counts)}
        return plain | ({"non_finite": self.non_finite} if self.non_finite else {})


def histogram_of(values: Sequence[float]) -> Histogram:
    """Return at most `BINS` bins of equal width, from the smallest value to the largest.

    For whole numbers, edges lie between them (x.5) and every bin spans as many whole numbers as any other. Otherwise
    some bins would span one more, and the histogram would look like a comb. Values that are all equal get one bin of
    width 1 around them. Edges are rounded to a ten-thousandth of the range.
    """
    finite = [float(value) for value in values if math.isfinite(value)]
    skipped = len(values) - len(finite)
    if not finite:
        return Histogram((), (), skipped)
    edges = _edges(finite)
    counts = [0] * (len(edges) - 1)
    for value in finite:
        counts[min(max(bisect_right(edges, value) - 1, 0), len(counts) - 1)] += 1
    return Histogram(
        tuple(edges), tuple(counts), skipped, math.fsum(finite), math.fsum(value * value for value in finite)
    )


def _edges(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    span = high - low
    if span == 0.0:
        half = max(0.5, abs(low) * 1e-6)  # the spacing of large floats may exceed 1
        return [low - half, low + half]
    if all(value.is_integer() for value in values) and span < 2**31:
        width = math.ceil((span + 1) / BINS)
        return [low - 0.5 + width * number for number in range(math.ceil((span + 1) / width) + 1)]
    if not math.isfinite(span):
        return [low, 0.0, high]  # their difference overflows
    digits = 4 - math.floor(math.log10(span))
    inner = [round(low + span * number / BINS, digits) for number in range(1, BINS)]
    return [low, *inner, high]
