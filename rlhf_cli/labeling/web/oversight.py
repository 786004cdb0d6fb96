"""What the administrator's page shows: everybody's progress, the pace, what was flagged, and how far people agree.

Reads the store through a session of its own in a thread of its own, so that looking never holds up labelling.
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
from rlhf_cli.labeling.session import LabelSession

_FRESH_SECONDS = 1.5
_AGREEMENT_SECONDS = 5.0
_REST = 10
"""A figure is made anew after it has rested so many times as long as it took."""
_PACE_SECONDS = 15 * 60
_MOST_REMARKS = 100
_EXCERPT = 160


class Oversight:
    """Snapshots of a store for the administrator.

    Args:
        store: the file.
        clock: seconds since 1970.
    """

    def __init__(self, store: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="oversight")
        self._session: LabelSession | None = None
        self._agreement: list[dict[str, Any]] = []
        self._agreement_of: list[LabelRecord] | None = None
        self._agreement_after = 0.0
        self._snapshot: dict[str, Any] | None = None
        self._snapshot_after = 0.0

    async def snapshot(self) -> dict[str, Any]:
        """How everything is, at most a few seconds old."""
        return json.loads(await asyncio.get_running_loop().run_in_executor(self._thread, self._look))

    async def labels_jsonl(self) -> bytes:
        """All labels as `rlhf label export` writes them."""
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
        self._count_agreement(labels)
        return {
            "at": round(self._clock() * 1000),
            "progress": asdict(progress),
            "overlap": session.plan.overlap,
            "annotators": [asdict(row) for row in session.overview()],
            "labels_per_hour": per_hour,
            "seconds_left": 3600 * progress.labels_left / per_hour if per_hour else None,
            "agreement": self._agreement,
            "remarks": remarks(labels),
        }

    def _count_agreement(self, labels: list[LabelRecord]) -> None:
        began = time.monotonic()
        if began < self._agreement_after or labels == self._agreement_of:
            return
        self._agreement, self._agreement_of = agreement_figures(labels), labels
        took = time.monotonic() - began
        self._agreement_after = began + max(_AGREEMENT_SECONDS, _REST * took)


def pace_per_hour(labels: Sequence[LabelRecord], now: float) -> float | None:
    """Rankings an hour that count towards what is needed, over the last quarter of an hour; None if there were none."""
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


def remarks(labels: Sequence[LabelRecord]) -> list[dict[str, Any]]:
    """What people had to say, newest first: flags with their reason, skips, notes."""
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
        for label in said[:_MOST_REMARKS]
    ]


def _excerpt(label: LabelRecord) -> str:
    text = label.prompt if isinstance(label.prompt, str) else label.prompt[-1].content if label.prompt else ""
    text = " ".join(text.split())
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 1] + "…"


def agreement_figures(labels: Sequence[LabelRecord]) -> list[dict[str, Any]]:
    """Agreement so far: the share of pairs of answers on which two people said the same, ties included."""
    verdicts: dict[tuple[str, int, int], list[int]] = {}
    for label in labels:
        if label.outcome == "ranked" and label.purpose == "label":
            rank = {index: place for place, tier in enumerate(label.tiers) for index in tier}
            for first in rank:
                for second in rank:
                    if first < second:
                        sign = (rank[first] > rank[second]) - (rank[first] < rank[second])
                        verdicts.setdefault((label.item, first, second), []).append(sign)
    same = both = 0
    for given in verdicts.values():
        for place, verdict in enumerate(given):
            for other in given[place + 1 :]:
                both += 1
                same += verdict == other
    if not both:
        return []
    return [{"name": "agreement on pairs", "value": same / both, "low": None, "high": None, "of": both}]
