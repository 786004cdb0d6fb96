"""What is wrong with a run, from its files alone: finished, stopped, killed or diverged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_cli.errors import UsageError
from rlhf_cli.pipeline.manifest import DamagedArtifact, read_manifest
from rlhf_cli.pipeline.run_directory import RunDirectory, has_files
from rlhf_cli.stages.registry import REGISTRY
from rlhf_cli.training.monitoring.health import report as health
from rlhf_cli.training.monitoring.health.findings import Finding, Severity
from rlhf_cli.training.monitoring.health.stage_rules import judge_evaluation, judge_reward_model, judge_sft
from rlhf_cli.training.monitoring.run_files import DETECTIONS, ENDED, METRICS, SAMPLES
from rlhf_cli.training.monitoring.step_lines import read_rows

State = Literal["finished", "running", "stopped", "diverged", "interrupted", "failed", "killed", "damaged"]
_STATES: Mapping[str, State] = {
    "DetectorStopError": "stopped",
    "DivergedError": "diverged",
    "Interrupted": "interrupted",
}
_RULES = {"sft": judge_sft, "train-rm": judge_reward_model, "evaluate": judge_evaluation}
_SAY_WHY = frozenset({"sft", "train-rm", "ppo"})
"""Stages with a training loop, which writes why it ended."""
_SHOWN = 3
"""Sample completions that are quoted."""


@dataclass(frozen=True)
class StageDiagnosis:
    """One stage of a run.

    Attributes:
        stage: its name.
        state: how it ended. `killed`: it neither finished nor said why, as after a power cut or `kill -9`.
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
    """All stages of a run that left something."""

    run_dir: Path
    stages: Sequence[StageDiagnosis]

    @property
    def verdict(self) -> Severity:
        """The worst severity; a stage that diverged, failed or was stopped is bad."""
        if any(stage.state in ("stopped", "diverged", "failed", "damaged") for stage in self.stages):
            return "bad"
        return health.verdict(finding for stage in self.stages for finding in stage.findings)

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        stages = [stage.as_json() for stage in self.stages]
        return {"run_dir": str(self.run_dir), "verdict": self.verdict, "stages": stages}


def diagnose(folder: Path) -> Diagnosis:
    """Diagnose a run.

    Args:
        folder: run directory.

    Raises:
        UsageError: the folder is not a run directory.
    """
    check_run_directory(folder)
    stages = diagnose_stages(folder, is_running=RunDirectory(folder).is_in_use)
    if not stages:
        raise UsageError(
            f"{folder} is not a run directory: no stage has written anything in it",
            hint="name the directory of a run: what `rlhf run` got as `--run-dir`, else runs/NAME",
        )
    return Diagnosis(folder, stages)


def diagnose_stages(folder: Path, *, is_running: bool) -> list[StageDiagnosis]:
    """Diagnose the stages of a run directory that left something.

    Args:
        folder: run directory.
        is_running: whether a process works on the run; else an unfinished stage was interrupted or killed.
    """
    found = [_diagnose(RunDirectory(folder), stage, is_running) for stage in REGISTRY]
    return [one for one in found if one is not None]


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


def _diagnose(run: RunDirectory, stage: str, is_running: bool) -> StageDiagnosis | None:
    work, artifact = run.work(stage), run.artifact(stage)
    if has_files(work):
        ended = _ended(work)
        without_word: State = "killed" if stage in _SAY_WHY else "interrupted"
        state: State = _STATES.get(ended["error"], "failed") if ended else "running" if is_running else without_word
        return _judge(stage, work, state, {}, told=ended.get("message") or "", hint=ended.get("hint") or "")
    if not artifact.is_dir():
        return None
    try:
        return _judge(stage, artifact, "finished", read_manifest(artifact).metrics)
    except DamagedArtifact as damage:
        hint = f"run again with `--force {stage}`"
        return _judge(stage, artifact, "damaged", {}, told=str(damage), hint=hint)


def _judge(
    stage: str, folder: Path, state: State, metrics: Mapping[str, float | None], *, told: str = "", hint: str = ""
) -> StageDiagnosis:
    rows = read_rows(folder / METRICS)
    if stage == "ppo":
        findings = health.judge(rows, read_rows(folder / DETECTIONS))
    else:
        rule = _RULES.get(stage)
        findings = [] if rule is None else health.by_severity(rule(rows, metrics))
    is_unusual = health.verdict(findings) != "fine" or state not in ("finished", "running")
    samples = _last_samples(folder) if is_unusual else ()
    steps = max((row["step"] for row in rows), default=0)
    return StageDiagnosis(stage, state, steps, told, hint, findings, samples)


def _ended(work: Path) -> dict[str, Any]:
    """Return what the stage wrote when it ended; empty if it did not, or if it cannot be read."""
    try:
        found = json.loads((work / ENDED).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "error" in found else {}


def _last_samples(folder: Path) -> Sequence[Mapping[str, Any]]:
    rows = [row for row in read_rows(folder / SAMPLES) if isinstance(row.get("completion"), str)]
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    return sorted(last, key=lambda row: -(row.get("score") or 0.0))[:_SHOWN]
