"""Run a finished run again from what its directory recorded, and compare the hashes of all artifacts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.errors import DataError, RLHFError, UsageError
from rlhf_cli.pipeline import runner
from rlhf_cli.pipeline.manifest import DamagedArtifact, Manifest, versions
from rlhf_cli.pipeline.record import RECIPE, recipe_of
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.pipeline.selection import Selection
from rlhf_cli.progress import say, warn
from rlhf_cli.quoting import word
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

    What people labeled and what judges replied is copied.

    Args:
        folder: run directory.
        again: run directory of the repetition; an interrupted one is resumed.

    Raises:
        UsageError: a stage has no recorded recipe, none is finished, or both directories are the same.
        DataError: an artifact is damaged.
    """
    if again.resolve() == folder.resolve():
        raise UsageError(f"{again} is the run itself", hint="name another directory with `--run-dir DIR`")
    before = _manifests(folder)
    missing = [stage for stage in before if not recipe_of(folder, stage).is_file()]
    if not before or missing:
        what = f"the recipe of `{missing[0]}` is not recorded" if missing else "no stage is finished"
        raise UsageError(f"{folder}: {what} in it", hint="name the directory of a finished run, such as runs/NAME")
    _warn_of_versions(before)
    _copy_kept(folder, again)
    for stage in before:
        loaded = load_recipe(recipe_of(folder, stage), ["remote=null"])  # that is the copy of the first run
        runner.run(loaded, again, Selection(stage, stage, frozenset(), names_stages=False))
    after = _manifests(again)
    return [Reproduced(stage, one.content_digest, after[stage].content_digest) for stage, one in before.items()]


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
        raise DataError(f"{damage}", hint=f"recreate it with `rlhf run {word(folder / RECIPE)}`") from None
    return {stage: manifest for stage, manifest in found.items() if manifest is not None}


def _warn_of_versions(before: Mapping[str, Manifest]) -> None:
    here = versions()
    changed = dict.fromkeys(
        f"{name} {then} -> {here[name]}"
        for manifest in before.values()
        for name, then in manifest.versions.items()
        if here.get(name, then) != then
    )
    if changed:
        warn(f"versions have changed since: {', '.join(changed)}; hashes may differ")


def _copy_kept(folder: Path, again: Path) -> None:
    """Copy what people labeled and what judges replied: nobody labels or pays twice for this."""
    for stage in ("label", "evaluate"):
        kept, target = RunDirectory(folder).kept(stage), RunDirectory(again).kept(stage)
        if kept.is_dir() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(kept, target)
            say(f"labels and replies of judges are copied from {kept}")
