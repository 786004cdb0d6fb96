"""What is wrong with a run, from its files alone: finished, stopped, killed or diverged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.errors import UsageError
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.pipeline.stage_states import StageState, State, states_of
from rlhf_cli.stages.registry import REGISTRY
from rlhf_cli.training.monitoring.health import report as health
from rlhf_cli.training.monitoring.health.findings import Finding, Severity
from rlhf_cli.training.monitoring.health.stage_rules import judge_evaluation, judge_reward_model, judge_sft
from rlhf_cli.training.monitoring.run_files import DETECTIONS, METRICS, SAMPLES
from rlhf_cli.training.monitoring.step_lines import read_rows

Row = dict[str, Any]
_RULES = {"sft": judge_sft, "train-rm": judge_reward_model, "evaluate": judge_evaluation}
_SHOWN = 3
"""Sample completions that are quoted."""


@dataclass(frozen=True)
class StageDiagnosis:
    """One stage of a run.

    Attributes:
        stage: its name.
        state: how it ended; see `stage_states.State`.
        steps: steps in its metrics.
        told: the message it ended with, if it did not finish.
        hint: that of the message.
        findings: what its metrics show, the worst first.
        samples: last completions of `samples.jsonl`, if something is wrong: the highest reward first.
    """

    stage: str
    state: State
    steps: int
    told: str
    hint: str
    findings: Sequence[Finding]
    samples: Sequence[Mapping[str, Any]] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        plain = {name: getattr(self, name) for name in ("stage", "state", "steps", "told", "hint")}
        findings = [finding.as_json() for finding in self.findings]
        return plain | {"findings": findings, "samples": [dict(one) for one in self.samples]}


@dataclass(frozen=True)
class Diagnosis:
    """All stages of a run that left something or are to come."""

    run_dir: Path
    stages: Sequence[StageDiagnosis]

    @property
    def verdict(self) -> Severity:
        """The worst severity; a stage that diverged, failed or was stopped is bad."""
        if any(stage.state in ("stopped", "diverged", "failed", "damaged") for stage in self.stages):
            return "bad"
        return health.verdict(finding for stage in self.stages for finding in stage.findings)

    @property
    def unfinished(self) -> list[str]:
        """Stages that are not finished, or were made from what an earlier stage no longer holds."""
        return [stage.stage for stage in self.stages if stage.state != "finished"]

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        stages = [stage.as_json() for stage in self.stages]
        plain = {"run_dir": str(self.run_dir), "verdict": self.verdict, "is_complete": not self.unfinished}
        return plain | {"stages": stages}


def diagnose(folder: Path) -> Diagnosis:
    """Diagnose a run.

    Args:
        folder: run directory.

    Raises:
        UsageError: the folder is not a run directory.
    """
    check_run_directory(folder)
    run = RunDirectory(folder)
    states = states_of(run, is_running=run.is_in_use)
    stages = [_diagnose(one) for one in states.values()]
    if all(one.state == "to come" for one in states.values()):
        raise UsageError(
            f"{folder} is not a run directory: no stage has written anything in it",
            hint="name the directory of a run: what `rlhf run` got as `--run-dir`, else runs/NAME",
        )
    return Diagnosis(folder, stages)


def check_run_directory(folder: Path) -> None:
    """Raise `UsageError` if the folder cannot be a run directory."""
    if folder.is_file():
        raise UsageError(
            f"{folder} is a file, not a run directory",
            hint="name the folder of the run, which for a recipe is runs/NAME unless `--run-dir` named another",
        )
    if not folder.is_dir():
        known = sorted(str(path) for path in Path("runs").glob("*") if path.is_dir())[:5]
        raise UsageError(
            f"{folder}: no such run directory",
            hint=f"there is {', '.join(known)}" if known else "name the folder of a run, such as runs/quickstart",
        )
    if folder.name in REGISTRY and (folder / "manifest.json").exists():
        raise UsageError(
            f"{folder} is the artifact of one stage, not a run directory", hint=f"name {folder.parent}, the run"
        )


def findings_of(one: StageState, rows: Sequence[Row], detections: Sequence[Row]) -> list[Finding]:
    """Return what the metrics of a stage show, the worst first.

    Args:
        one: the stage.
        rows: of its `metrics.jsonl`.
        detections: of its `detections.jsonl`.
    """
    if one.stage == "ppo":
        return health.judge(rows, detections)
    rule = _RULES.get(one.stage)
    return [] if rule is None else health.by_severity(rule(rows, one.metrics))


def _diagnose(one: StageState) -> StageDiagnosis:
    rows = read_rows(one.folder / METRICS)
    findings = findings_of(one, rows, read_rows(one.folder / DETECTIONS))
    is_unusual = health.verdict(findings) != "fine" or one.state not in ("finished", "running", "outdated", "to come")
    samples = _last_samples(one.folder) if is_unusual else ()
    steps = max((row["step"] for row in rows), default=0)
    return StageDiagnosis(one.stage, one.state, steps, one.told, one.hint, findings, samples)


def _last_samples(folder: Path) -> Sequence[Mapping[str, Any]]:
    rows = [row for row in read_rows(folder / SAMPLES) if isinstance(row.get("completion"), str)]
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    return sorted(last, key=lambda row: -(row.get("score") or 0.0))[:_SHOWN]
