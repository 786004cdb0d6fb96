"""Everything a report shows of one run, read from its files; nothing is computed anew."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_cli.errors import DataError, UsageError
from rlhf_cli.files import reading_artifact
from rlhf_cli.labeling.warnings import LabelWarning, doubtful_warnings
from rlhf_cli.pipeline.manifest import FILE_NAME, DamagedArtifact, Manifest
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.stages.registry import REGISTRY

Row = dict[str, Any]

EVALUATION, SAMPLES, QUALITY, BEST_OF_N = "evaluation.json", "samples.jsonl", "quality.json", "best_of_n.json"
METRICS, HEALTH, DETECTIONS = "metrics.jsonl", "health.json", "detections.jsonl"

_SHOWN = 36
"""Samples on the page: a third each are the largest gains, the largest losses, and drawn at random."""


@dataclass(frozen=True)
class Shown:
    """Samples that the page shows.

    Attributes:
        rows: of `samples.jsonl`, each with "chosen_as": why it is shown.
        of: number of all samples.
    """

    rows: Sequence[Row]
    of: int


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run say.

    Attributes:
        folder: run directory.
        manifests: stage -> manifest, of the finished stages in order.
        metrics: stage -> rows of its `metrics.jsonl`.
        evaluation: `evaluation.json`, or None.
        samples: of the evaluation.
        quality: of the reward model, or None.
        best_of_n: `best_of_n.json`, or None.
        health: `health.json` of PPO, or None.
        detections: rows of PPO's `detections.jsonl`.
        label_warnings: stage -> what puts its labels in doubt, or its judgments.
        group: number of its color; runs that differ in their seeds alone share it.
    """

    folder: Path
    manifests: Mapping[str, Manifest]
    metrics: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    evaluation: Row | None = None
    samples: Shown = field(default=Shown((), 0))
    quality: Row | None = None
    best_of_n: Row | None = None
    health: Row | None = None
    detections: Sequence[Row] = field(default=())
    label_warnings: Mapping[str, Sequence[LabelWarning]] = field(default_factory=dict)
    group: int = 0

    @property
    def name(self) -> str:
        """Name of the run directory."""
        return self.folder.resolve().name

    @property
    def settings(self) -> dict[str, Any]:
        """Dotted setting -> value, of everything that the results depend on; inputs by their digests."""
        found: dict[str, Any] = {}
        for stage, manifest in self.manifests.items():
            found |= manifest.identity["settings"]
            external = {name for name in manifest.identity["inputs"] if name not in manifest.identity["upstream"]}
            found |= {f"{stage}: {name}": manifest.identity["inputs"][name] for name in sorted(external)}
        return found


def read_run(folder: Path) -> RunFiles:
    """Read the files of a run.

    Raises:
        UsageError: the folder is not a run directory, or no stage of it is finished.
        DataError: an artifact is damaged.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such run directory", hint="name the folder that `rlhf run` wrote")
    if folder.name in REGISTRY and (folder / FILE_NAME).is_file():
        raise UsageError(
            f"{folder} is the artifact of one stage, not a run directory", hint=f"name {folder.parent}, the run"
        )
    run = RunDirectory(folder)
    try:
        found = {stage: run.read_manifest(stage) for stage in REGISTRY}
    except DamagedArtifact as damage:
        raise DataError(f"{damage}", hint="recreate it with `rlhf run RECIPE`") from None
    manifests = {stage: manifest for stage, manifest in found.items() if manifest is not None}
    if not manifests:
        what = f"{FILE_NAME} of a finished stage"
        raise UsageError(f"{folder}: no {what} in it", hint="name the folder that `rlhf run` wrote, such as runs/NAME")
    ppo, evaluate = run.artifact("ppo"), run.artifact("evaluate")
    return RunFiles(
        folder,
        manifests,
        metrics={stage: _lines(run.artifact(stage) / METRICS) for stage in manifests},
        evaluation=_object(evaluate / EVALUATION),
        samples=_shown(_lines(evaluate / SAMPLES)),
        quality=_object(run.artifact("train-rm") / QUALITY),
        best_of_n=_object(run.artifact("best-of-n") / BEST_OF_N),
        health=_object(ppo / HEALTH),
        detections=_lines(ppo / DETECTIONS),
        label_warnings={stage: doubtful_warnings(run.artifact(stage)) for stage in manifests},
    )


def _object(path: Path) -> Row | None:
    if not path.is_file():
        return None
    with reading_artifact(path):
        return _row(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with reading_artifact(path), path.open(encoding="utf-8") as file:
        return [_row(line) for line in file if line.strip()]


def _row(text: str) -> Row:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"it has {text[:20]!r} in the place of an object")
    return found


def _shown(rows: Sequence[Row]) -> Shown:
    """Choose the largest gains, the largest losses, and others at random, in the order of the file."""
    each = _SHOWN // 3
    order = sorted(range(len(rows)), key=lambda number: gain(rows[number]))
    chosen: dict[int, str] = {}
    for number in reversed(order[-each:]):
        chosen[number] = "largest gain" if gain(rows[number]) > 0 else "random"
    for number in order[:each]:
        chosen.setdefault(number, "largest loss" if gain(rows[number]) < 0 else "random")
    left = [number for number in range(len(rows)) if number not in chosen]
    drawn = random.Random(0).sample(left, min(len(left), _SHOWN - len(chosen)))
    chosen |= dict.fromkeys(drawn, "random")
    return Shown([rows[number] | {"chosen_as": chosen[number]} for number in sorted(chosen)], len(rows))


def gain(row: Mapping[str, Any]) -> float:
    """Return by how much the policy's completion scores higher than the baseline's."""
    for name in ("gold", "reward"):
        if f"{name}_policy" in row:
            return float(row[f"{name}_policy"]) - float(row[f"{name}_baseline"])
    return 0.0


def differing(runs: Sequence[RunFiles]) -> list[tuple[str, list[Any]]]:
    """Return (setting, its value in each run) of the settings in which runs differ."""
    settings = [run.settings for run in runs]
    names: Iterable[str] = dict.fromkeys(name for one in settings for name in one)
    found = [(name, [one.get(name) for one in settings]) for name in names]
    return [(name, values) for name, values in found if len({json.dumps(value) for value in values}) > 1]
