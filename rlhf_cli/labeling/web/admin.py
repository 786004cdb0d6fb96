"""Data of the admin page: progress, pace, comments, agreement.

Reads the store through its own session in its own thread, so it never blocks labeling.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_cli.labeling.label_records import LabelRecord, to_json
from rlhf_cli.labeling.session.session import LabelSession

_FRESH_SECONDS = 1.5
_STATISTICS_SECONDS = 5.0
_REST = 10
"""Results are recomputed after this many times the time the computation took."""
_PACE_SECONDS = 15 * 60
_MOST_COMMENTS = 100
_EXCERPT = 160
_SEED = 0
"""Seed of the bootstrap; constant, so that equal labels give equal results."""


class AdminSnapshots:
    """Snapshots of a store for the admin page.

    Args:
        store: the file.
        clock: seconds since 1970.
    """

    def __init__(self, store: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="admin")
        self._session: LabelSession | None = None
        self._statistics: dict[str, Any] = {"estimates": [], "warnings": []}
        self._statistics_of: list[LabelRecord] | None = None
        self._statistics_after = 0.0
        self._snapshot: dict[str, Any] | None = None
        self._snapshot_after = 0.0

    async def snapshot(self) -> dict[str, Any]:
        """The current state, at most a few seconds old."""
        return json.loads(await asyncio.get_running_loop().run_in_executor(self._thread, self._look))

    async def labels_jsonl(self) -> bytes:
        """All labels, as `rlhf label export --format labels` writes them."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._export)

    def close(self) -> None:
        """Stop the thread and close its session."""
        self._thread.shutdown()
        if self._session is not None:
            self._session.close()

    def _opened(self) -> LabelSession:
        if self._session is None:
            self._session = LabelSession(self._store, create=False)
        return self._session

    def _export(self) -> bytes:
        rows = (json.dumps(to_json(label), ensure_ascii=False) + "\n" for label in self._opened().labels())
        return "".join(rows).encode("utf-8", "replace")

    def _look(self) -> str:
        began = time.monotonic()
        if self._snapshot is None or began >= self._snapshot_after:
            self._snapshot = self._made()
            took = time.monotonic() - began
            self._snapshot_after = began + max(_FRESH_SECONDS, _REST * took)
        return json.dumps(self._snapshot)

    def _made(self) -> dict[str, Any]:
        session = self._opened()
        labels, progress = session.labels(), session.progress()
        per_hour = pace_per_hour(labels, self._clock())
        self._count(labels)
        return {
            "at": round(self._clock() * 1000),
            "progress": asdict(progress),
            "overlap": session.plan.overlap,
            "annotators": [asdict(row) for row in session.overview()],
            "labels_per_hour": per_hour,
            "seconds_left": 3600 * progress.labels_left / per_hour if per_hour else None,
            "statistics": self._statistics,
            "comments": comments(labels),
        }

    def _count(self, labels: list[LabelRecord]) -> None:
        began = time.monotonic()
        if began < self._statistics_after or labels == self._statistics_of:
            return
        self._statistics, self._statistics_of = statistics_of(labels), labels
        took = time.monotonic() - began
        self._statistics_after = began + max(_STATISTICS_SECONDS, _REST * took)


def pace_per_hour(labels: Sequence[LabelRecord], now: float) -> float | None:
    """Ordinary rankings per hour over the last 15 minutes; None if there were fewer than two."""
    times = [
        _seconds(label.at)
        for label in labels
        if label.outcome == "ranked" and label.purpose == "label" and now - _seconds(label.at) < _PACE_SECONDS
    ]
    if len(times) < 2:
        return None
    return 3600 * len(times) / max(now - min(times), 1.0)


def _seconds(at: str) -> float:
    return datetime.fromisoformat(at.replace("Z", "+00:00")).astimezone(UTC).timestamp()


def comments(labels: Sequence[LabelRecord]) -> list[dict[str, Any]]:
    """Flags, skips and notes of annotators, newest first."""
    said = [label for label in labels if label.outcome != "ranked" or label.note]
    said.sort(key=lambda label: label.at, reverse=True)
    return [
        {
            "kind": label.outcome if label.outcome != "ranked" else "note",
            "annotator": label.annotator,
            "text": label.reason or label.note,
            "prompt": _excerpt(label),
            "at": label.at,
        }
        for label in said[:_MOST_COMMENTS]
    ]


def _excerpt(label: LabelRecord) -> str:
    text = label.prompt if isinstance(label.prompt, str) else label.prompt[-1].content if label.prompt else ""
    text = " ".join(text.split())
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 1] + "…"


def statistics_of(labels: Sequence[LabelRecord]) -> dict[str, Any]:
    """Estimates that have a value, and all warnings, of `rlhf label stats`."""
    from rlhf_cli.labeling.statistics.summary import statistics  # imports numpy, which only the admin page needs

    if not any(label.outcome == "ranked" for label in labels):
        return {"estimates": [], "warnings": []}
    report = statistics(labels, _SEED)
    estimates = {
        "agreement": report.agreement.with_ties,
        "agreement without ties": report.agreement.without_ties,
        "alpha": report.agreement.alpha,
        "self-consistency": report.self_consistency,
        "gold accuracy": report.gold,
        "earlier shown wins": report.first_shown,
        "longer wins": report.longer,
    }
    return {
        "estimates": [
            {
                "name": name,
                "value": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "is_share": name != "alpha",
            }
            for name, estimate in estimates.items()
            if estimate.value is not None
        ],
        "warnings": [asdict(warning) for warning in report.warnings],
    }
