"""What a stage's result depends on, hashed: with an equal fingerprint the stage need not run again.

Settings marked `EffortOnly` in the schema do not count: someone who ran out of memory lowers `micro_batch_size` and
resumes from the last checkpoint. Names of files do not count either: their content does (docs/decisions/0001).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rlhf_cli.errors import DataError
from rlhf_cli.files import hash_file, hash_folder
from rlhf_cli.pipeline.manifest import DamagedArtifact, Identity
from rlhf_cli.pipeline.paths import check_critic, check_data, check_file, check_model, function_file
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.recipe.fields import dotted, values
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.base import Stage
from rlhf_cli.stages.inputs import Input, StageInputs

PENDING = "pending"
"""Digest of an artifact that an earlier stage is still to write."""


def settings_of(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """Dotted settings that the stage's result depends on, its own and the shared ones that reach it."""
    section = recipe.section(stage.name)
    assert section is not None
    places = [*values(section, (stage.section,)), *values(recipe.data, ("data",))]
    if section.loads_model:
        places += values(recipe.model, ("model",))
    kept = {
        dotted(place): value
        for place, setting, value in places
        if not setting.effort_only and not (setting.names and setting.names.leads_out(value))
    }
    kept.pop("model.revision", None)  # part of the base model's digest
    return {name: value for name, value in kept.items() if not name.startswith(stage.unaffected_by)} | {
        "seed": recipe.seed
    }


class Digests:
    """Hashes of everything stages read, each made once a process."""

    def __init__(self, recipe: Recipe, run: RunDirectory) -> None:
        self._recipe = recipe
        self._run = run
        self._known: dict[tuple[str, str], str] = {}

    def of(self, given: Input) -> str:
        """Digest of one input; raises an `RLHFError` where there is nothing to hash."""
        if given.kind == "artifact":
            return self._artifact(given)
        key = (given.kind, given.source)
        if key not in self._known:
            self._known[key] = self._compute(given)
        return self._known[key]

    def _artifact(self, given: Input) -> str:
        upstream = given.upstream or ""
        try:
            manifest = self._run.read_manifest(upstream)
        except DamagedArtifact as damage:
            raise DataError(f"{damage}", hint=f"make it again with `rlhf run RECIPE --force {upstream}`") from None
        return PENDING if manifest is None else manifest.content_digest

    def _compute(self, given: Input) -> str:
        if given.kind == "build":
            return "build"
        if given.kind == "function":
            file = function_file(given.source, given.setting)
            return f"{hash_file(file)}:{given.source.rpartition(':')[2]}"
        if given.kind == "data":
            check_data(given.source, given.setting)
            from rlhf_cli.data.sources import source_digest

            return source_digest(given.source)
        if given.kind == "file":
            check_file(given.source, given.setting)
            return hash_file(Path(given.source))
        if given.kind == "critic":
            check_critic(given.source, given.setting)
            return hash_folder(Path(given.source))
        check_model(given.source, given.setting)
        if Path(given.source).is_dir():
            return hash_folder(Path(given.source))
        revision = self._recipe.model.revision if given.source == self._recipe.model.path else None
        return f"hub:{given.source}@{revision or 'main'}"


def identity(stage: Stage, recipe: Recipe, inputs: StageInputs, digests: Digests, pending: frozenset[str]) -> Identity:
    """Everything the result depends on; artifacts of `pending` stages count as not yet known."""
    counted = {name: given for name, given in inputs.by_name().items() if given.matters}
    return {
        "stage": stage.name,
        "settings": settings_of(stage, recipe),
        "inputs": {
            name: PENDING if given.upstream in pending else digests.of(given) for name, given in counted.items()
        },
        "upstream": {name: given.upstream for name, given in counted.items() if given.upstream is not None},
    }


def fingerprint(what: Identity) -> str:
    """sha256 of an identity."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def differences(old: Identity, new: Identity, inputs: StageInputs) -> list[str]:
    """What changed, one phrase per change, in the words of the recipe. Inputs still pending are not compared.

    Args:
        old: identity of the artifact, or of the attempt that did not finish.
        new: identity by the recipe as it is.
        inputs: of `new`, for what they are called.
    """
    named = inputs.by_name()
    found = []
    before, after = old.get("settings", {}), new["settings"]
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            found.append(f"`{name}` was {_shown(before, name)}, now {_shown(after, name)}")
    before, after = old.get("inputs", {}), new["inputs"]
    for name in sorted(before.keys() | after.keys()):
        if PENDING not in (before.get(name), after.get(name)) and before.get(name) != after.get(name):
            found.append(f"{named[name].described if name in named else f'input `{name}`'} changed")
    return found


def _shown(settings: dict[str, Any], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else "not set"
