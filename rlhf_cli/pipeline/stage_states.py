"""Where each stage of a run is, from the files of its directory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rlhf_cli.pipeline.manifest import DamagedArtifact, Manifest, read_manifest
from rlhf_cli.pipeline.record import RECIPE
from rlhf_cli.pipeline.run_directory import RunDirectory, has_files
from rlhf_cli.stages.base import section_of
from rlhf_cli.stages.registry import REGISTRY
from rlhf_cli.training.monitoring.run_files import ENDED

State = Literal[
    "finished", "outdated", "running", "to come", "stopped", "diverged", "interrupted", "failed", "killed", "damaged"
]
"""`outdated`: finished, but an earlier stage that it was made from is not, or has other content now. `to come`: the
recipe of the run has the stage, and it has not begun. `stopped`: by a detector. `killed`: it neither finished nor said
why, as after a power cut or `kill -9`."""

_ENDED: Mapping[str, State] = {
    "DetectorStopError": "stopped",
    "DivergedError": "diverged",
    "Interrupted": "interrupted",
}
_SAY_WHY = frozenset({"sft", "train-rm", "ppo"})
"""Stages with a training loop, which writes why it ended."""


@dataclass(frozen=True)
class StageState:
    """Where a stage of a run is.

    Attributes:
        stage: its name.
        folder: with its files: the work folder of an unfinished stage, else its artifact.
        state: see `State`.
        manifest: of its artifact; None for a stage that is not finished.
        told: the message it ended with, if it did not finish.
        hint: that of the message.
    """

    stage: str
    folder: Path
    state: State
    manifest: Manifest | None = None
    told: str = ""
    hint: str = ""

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """Metrics of its manifest; empty for an unfinished stage."""
        return {} if self.manifest is None else self.manifest.metrics


def states_of(run: RunDirectory, *, is_running: bool, running: str | None = None) -> dict[str, StageState]:
    """Return where the stages are, in order: those that left something, and those that are to come.

    Args:
        run: run directory.
        is_running: whether a process works on the run.
        running: the stage that it works on; None if that is not known.
    """
    planned = planned_stages(run.path)
    found: dict[str, StageState] = {}
    for stage in REGISTRY:
        if stage == running:  # before it has written anything, an earlier artifact or nothing is there
            found[stage] = StageState(stage, run.work(stage), "running")
        elif (one := _state_of(run, stage, is_running=is_running and running is None)) is not None:
            found[stage] = replace(one, state="outdated") if _is_outdated(one, found) else one
        elif stage in planned:
            found[stage] = StageState(stage, run.artifact(stage), "to come")
    return found


def planned_stages(folder: Path) -> list[str]:
    """Return the stages in the recipe of the last `rlhf run` in a run directory; none if there was no such run."""
    try:
        text = (folder / RECIPE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    sections = set(re.findall(r"^(\w+):", text, re.MULTILINE))  # parsing it would take longer than all the rest
    return [stage for stage in REGISTRY if section_of(stage) in sections]


def _state_of(run: RunDirectory, stage: str, *, is_running: bool) -> StageState | None:
    """Return where a stage is; None if it has left nothing."""
    work, artifact = run.work(stage), run.artifact(stage)
    if has_files(work):
        ended = _ended(work)
        without_word: State = "killed" if stage in _SAY_WHY else "interrupted"
        state: State = _ENDED.get(ended["error"], "failed") if ended else "running" if is_running else without_word
        return StageState(stage, work, state, None, ended.get("message") or "", ended.get("hint") or "")
    if is_running and run.began_file(stage).exists():
        return StageState(stage, work, "running")
    if not artifact.is_dir():
        return None
    try:
        return StageState(stage, artifact, "finished", read_manifest(artifact))
    except DamagedArtifact as damage:
        hint = f"recreate it with `rlhf run RECIPE --force {stage}`"
        return StageState(stage, artifact, "damaged", None, str(damage), hint)


def _is_outdated(one: StageState, earlier: Mapping[str, StageState]) -> bool:
    """Whether a finished stage was made from what an earlier stage no longer holds, or is about to replace."""
    if one.manifest is None:
        return False
    identity = one.manifest.identity
    for name, upstream in identity.get("upstream", {}).items():
        source = earlier.get(upstream)
        if source is None or source.state == "to come":  # removed, perhaps to save space
            continue
        if source.state != "finished" or source.manifest is None:
            return True
        if source.manifest.content_digest != identity["inputs"][name]:
            return True
    return False


def _ended(work: Path) -> dict[str, Any]:
    """Return what the stage wrote when it ended; empty if it did not, or if it cannot be read."""
    try:
        found = json.loads((work / ENDED).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "error" in found else {}
