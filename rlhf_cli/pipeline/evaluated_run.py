"""What a finished evaluation says of a run: settings, inputs, and the scores of its policy by prompt."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cli.errors import DataError, UsageError
from rlhf_cli.pipeline.manifest import DamagedArtifact
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.stages.registry import REGISTRY

_POINTS = {"policy": 1.0, "tie": 0.5, "baseline": 0.0}


@dataclass(frozen=True)
class EvaluatedRun:
    """An evaluated run.

    Attributes:
        folder: run directory.
        seed: of the run.
        settings: dotted setting -> value, of all stages of the run, without the seed; and the digest of every input of
            its training from outside, such as data and base model.
        inputs: digests of what `evaluate` read.
        scores: prompt -> measure -> mean over the completions of the prompt.
    """

    folder: Path
    seed: int
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    scores: Mapping[str, Mapping[str, float]]


def read_evaluated_run(folder: Path) -> EvaluatedRun:
    """Read an evaluated run.

    Raises:
        UsageError: there is no finished evaluation.
        DataError: an artifact is damaged.
    """
    directory = RunDirectory(folder)
    try:
        manifests = {stage: directory.read_manifest(stage) for stage in REGISTRY} if folder.is_dir() else {}
        evaluation = manifests.get("evaluate")
        if evaluation is None:
            raise UsageError(
                f"{folder}: {'no finished evaluation' if folder.is_dir() else 'no such run directory'}",
                hint="`rlhf compare` reads what `rlhf evaluate` or `rlhf run` wrote; name their run directories",
            )
        evaluation.verify(directory.artifact("evaluate"))
    except DamagedArtifact as damage:
        raise DataError(f"{damage}", hint="evaluate again with `rlhf evaluate --force`") from None
    settings: dict[str, Any] = {}
    for stage, manifest in manifests.items():
        if manifest is None:
            continue
        settings |= manifest.identity["settings"]
        if stage != "evaluate":
            own = set(manifest.identity["inputs"]) - set(manifest.identity["upstream"])
            settings |= {f"{stage}: {name}": manifest.identity["inputs"][name] for name in sorted(own)}
    seed = int(settings.pop("seed", 0))
    path = directory.artifact("evaluate") / "samples.jsonl"
    return EvaluatedRun(folder, seed, settings, dict(evaluation.identity["inputs"]), _scores(path))


def _scores(samples: Path) -> dict[str, dict[str, float]]:
    """Read prompt -> measure -> mean."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with samples.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            own = found[json.dumps(row["prompt"], ensure_ascii=False, sort_keys=True)]
            for name, value in _measured(row).items():
                own[name].append(value)
    return {prompt: {name: float(np.mean(values)) for name, values in own.items()} for prompt, own in found.items()}


def _measured(row: Mapping[str, Any]) -> dict[str, float]:
    values = {
        "gold": row.get("gold_policy"),
        "reward": row.get("reward_policy"),
        "preferred": _POINTS[row["winner"]],
        "kl": row.get("kl_nats"),
        "tokens": row["tokens_policy"],
        "finished": row["finished_policy"],
    }
    return {name: float(value) for name, value in values.items() if value is not None}
