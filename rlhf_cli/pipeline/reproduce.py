"""Run a finished run again from what its directory recorded, and compare the hashes of all artifacts."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.errors import DataError, RLHFError, UsageError
from rlhf_cli.pipeline import runner
from rlhf_cli.pipeline.manifest import DamagedArtifact, Manifest, versions
from rlhf_cli.pipeline.planner import Selection
from rlhf_cli.pipeline.record import ENVIRONMENT, RECIPE
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.progress import say, warn
from rlhf_cli.recipe.loader import load_recipe
from rlhf_cli.stages.registry import REGISTRY


@dataclass(frozen=True)
class Reproduced:
    """A stage of both runs.

    Attributes:
        stage: its name.
        before: sha256 of the content of the first artifact.
        after: that of the second.
    """

    stage: str
    before: str
    after: str

    @property
    def is_equal(self) -> bool:
        """Whether both have the same content."""
        return self.before == self.after


def reproduce(folder: Path, again: Path) -> list[Reproduced]:
    """Run everything that is finished in a run directory again, in another one.

    What people labeled is copied, since no one labels twice for this.

    Args:
        folder: run directory.
        again: run directory of the repetition; an interrupted one is resumed.

    Raises:
        UsageError: the run has no recorded recipe or no finished stage, or both directories are the same.
        DataError: an artifact is damaged.
    """
    if again.resolve() == folder.resolve():
        raise UsageError(f"{again} is the run itself", hint="name another directory with `--run-dir DIR`")
    if not (folder / RECIPE).is_file():
        raise UsageError(
            f"{folder} has no {RECIPE}, which `rlhf run` writes", hint="name a run directory, such as runs/NAME"
        )
    before = _manifests(folder)
    if not before:
        raise UsageError(f"no stage of {folder} is finished", hint=f"finish it with `rlhf run {folder / RECIPE}`")
    _warn_of_versions(folder)
    _copy_labels(folder, again)
    stages = list(before)
    loaded = load_recipe(folder / RECIPE)
    runner.run(loaded, again, Selection(stages[0], stages[-1], frozenset(), names_stages=False))
    after = _manifests(again)
    return [Reproduced(stage, before[stage].content_digest, after[stage].content_digest) for stage in stages]


def check_equal(found: list[Reproduced]) -> None:
    """Raise `RLHFError` if the content of a stage differs."""
    different = [one.stage for one in found if not one.is_equal]
    if different:
        raise RLHFError(
            f"{len(different)} of {len(found)} stages differ, the first is `{different[0]}`",
            hint="equal results need the same versions, data and kind of machine, and as many processes and threads",
        )


def _manifests(folder: Path) -> dict[str, Manifest]:
    run = RunDirectory(folder)
    try:
        found = {stage: run.read_manifest(stage) for stage in REGISTRY}
    except DamagedArtifact as damage:
        raise DataError(f"{damage}", hint=f"recreate it with `rlhf run {folder / RECIPE}`") from None
    return {stage: manifest for stage, manifest in found.items() if manifest is not None}


def _warn_of_versions(folder: Path) -> None:
    path = folder / ENVIRONMENT
    then = json.loads(path.read_text(encoding="utf-8"))["versions"] if path.is_file() else {}
    changed = [f"{name} {then[name]} -> {now}" for name, now in versions().items() if then.get(name, now) != now]
    if changed:
        warn(f"versions have changed since: {', '.join(changed)}; hashes may differ")


def _copy_labels(folder: Path, again: Path) -> None:
    kept, target = RunDirectory(folder).kept("label"), RunDirectory(again).kept("label")
    if kept.is_dir() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(kept, target)
        say(f"labels are copied from {kept}")
