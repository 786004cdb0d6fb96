"""Findings from what the detectors of a run saw, with the completions that show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_cli.training.monitoring.detectors.catalog import BY_NAME
from rlhf_cli.training.monitoring.health.findings import Finding


def detection_findings(detections: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Return one finding per detector that passed a threshold.

    Args:
        detections: rows of `detections.jsonl`, in the order of their steps. Those of unknown detectors are ignored.
    """
    by_detector: dict[str, list[Mapping[str, Any]]] = {}
    for row in detections:
        if row.get("detector") in BY_NAME:
            by_detector.setdefault(row["detector"], []).append(row)
    return [_finding(name, rows) for name, rows in by_detector.items()]


def _finding(name: str, rows: Sequence[Mapping[str, Any]]) -> Finding:
    detector, last = BY_NAME[name], rows[-1]
    passed = [row for row in rows if row["status"] != "quiet"]
    worst = passed[-1]
    seen = f"step {worst['step']:,}: {worst['seen']}"
    if len(passed) > 1:
        seen += f"; first warned in step {passed[0]['step']:,}"
    if last["status"] == "quiet":
        seen += f"; back to normal in step {last['step']:,}"
    return Finding(
        detector.subject,
        "bad" if last["status"] == "stop" else "look",
        seen,
        detector.means,
        detector.change,
        (passed[0]["step"], last["step"]),
        tuple(worst["completions"]),
    )


def merged(by_rules: Sequence[Finding], detected: Sequence[Finding]) -> list[Finding]:
    """Return both without judging a quantity twice: a rule's `look` or `bad` has the word, with the completions."""
    unusual = {finding.subject: finding for finding in by_rules if finding.severity != "fine"}
    of_detectors = {finding.subject: finding for finding in detected}
    found = [
        finding.with_evidence(of_detectors.get(finding.subject))
        for finding in by_rules
        if finding.severity != "fine" or finding.subject not in of_detectors
    ]
    return found + [finding for finding in detected if finding.subject not in unusual]
