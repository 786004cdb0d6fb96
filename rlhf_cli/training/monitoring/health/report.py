"""Is this curve normal? Findings about the metrics of a PPO run: what they usually mean, and which setting to change.

docs/health.md explains the rules and their thresholds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rlhf_cli.console import console
from rlhf_cli.plain_text import printable
from rlhf_cli.training.monitoring.health.detection_findings import detection_findings, merged
from rlhf_cli.training.monitoring.health.findings import MIN_STEPS, Finding, Run, Severity
from rlhf_cli.training.monitoring.health.rules import COMPLETION_RULES
from rlhf_cli.training.monitoring.health.update_rules import UPDATE_RULES

_ORDER: tuple[Severity, ...] = ("bad", "look", "fine")
SHORT = "length of the run"
"""Subject of the finding that there are too few steps to judge trends."""
_QUOTED = 120
"""Characters of a completion that are printed; `health.json` has more."""
_COLORS: Mapping[Severity, str] = {"bad": "bold red", "look": "yellow", "fine": "green"}

RULES: tuple[Callable[[Run], Iterable[Finding]], ...] = (*COMPLETION_RULES, *UPDATE_RULES)


def judge(rows: Sequence[Mapping[str, Any]], detections: Sequence[Mapping[str, Any]] = ()) -> list[Finding]:
    """Return findings about a run, the worst first.

    Args:
        rows: rows of `metrics.jsonl`, in the order of their steps. A metric that no row has is not judged.
        detections: rows of `detections.jsonl`.
    """
    run = Run.of(rows)
    findings = [finding for rule in RULES for finding in rule(run)]
    if len(run) < MIN_STEPS:
        seen = f"{len(run):,} step{'' if len(run) == 1 else 's'}"
        findings.append(Finding(SHORT, "fine", f"{seen}: judging trends takes {MIN_STEPS}", steps=run.span))
    return by_severity(merged(findings, detection_findings(detections)))


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings with the worst first, and of these the ones that completions show."""
    return sorted(findings, key=lambda finding: (_ORDER.index(finding.severity), not finding.completions))


def verdict(findings: Iterable[Finding]) -> Severity:
    """Return the worst severity; `fine` without findings."""
    found: set[Severity] = {finding.severity for finding in findings}
    return min(found, key=_ORDER.index) if found else "fine"


def write(path: Path, findings: Sequence[Finding]) -> None:
    """Write a `health.json` with the verdict and every finding."""
    plain = {"verdict": verdict(findings), "findings": [finding.as_json() for finding in findings]}
    path.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def show(findings: Sequence[Finding]) -> None:
    """Print the findings."""
    console.print(view(findings), soft_wrap=False)  # wrapped in logs too


def view(findings: Sequence[Finding]) -> RenderableType:
    """Return the findings as they are printed: severity, subject, what was seen, what it means, and what to change."""
    counts = {severity: sum(finding.severity == severity for finding in findings) for severity in _ORDER}
    is_short = any(finding.subject == SHORT for finding in findings)
    title = "is the curve normal? " + (
        ("too short to tell" if is_short else "nothing stands out")
        if not counts["bad"] and not counts["look"]
        else ", ".join(f"{counts[severity]} {severity}" for severity in ("bad", "look") if counts[severity])
    )
    whole = Table.grid()
    whole.add_column()
    whole.add_row(Text(title, style="bold"))
    whole.add_row(table_of(findings))
    return whole


def table_of(findings: Sequence[Finding]) -> RenderableType:
    """Return one row per finding: severity, subject, and the finding in words."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        severity = Text(finding.severity, style=_COLORS[finding.severity])
        table.add_row(severity, Text(finding.subject), _explained(finding))
    return table


def _explained(finding: Finding) -> Text:
    text = Text(finding.seen)
    if finding.means:
        text.append(f"\nusually: {finding.means}", style="dim")
    for change in finding.change:
        text.append(f"\n- {change}", style="dim")
    for one in finding.completions:
        text.append(f'\n"{excerpt(one["completion"], _QUOTED)}" (reward {one["score"]:+.2f})')
    return text


def excerpt(text: str, length: int) -> str:
    """Return a text as it is quoted: on one line, cut to `length` characters, without control characters."""
    plain = " ".join(printable(text).split())
    return plain if len(plain) <= length else f"{plain[:length].rstrip()}..."
