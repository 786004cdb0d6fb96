"""Fingerprint of a stage: a hash of everything its result depends on. A stage whose fingerprint is unchanged is cached.

Settings marked `EffortOnly` in the schema do not count: after running out of memory, a user can lower
`micro_batch_size` and resume from the last checkpoint. File names do not count either, only the content
(docs/decisions/0001).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rlhf_cli.errors import DataError
from rlhf_cli.files import hash_file, hash_folder
from rlhf_cli.models.hub import hub_model, known_commit
from rlhf_cli.pipeline.manifest import DamagedArtifact, Identity
from rlhf_cli.pipeline.paths import check_critic, check_data, check_file, check_model, function_file
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.recipe.fields import dotted, values
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.base import Stage
from rlhf_cli.stages.inputs import Input, StageInputs

PENDING = "pending"
"""Digest of an artifact that an earlier stage has not written yet."""


def settings_of(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """Return the dotted settings that the stage's result depends on: its own and the relevant shared ones."""
    section = recipe.section(stage.name)
    assert section is not None
    shared = [found for name in ("data", "sampling", "generation") for found in values(getattr(recipe, name), (name,))]
    found = [*values(section, (stage.section,)), *shared]
    if section.loads_model:
        found += values(recipe.model, ("model",))
    kept = {
        dotted(key_path): value
        for key_path, setting, value in found
        if not setting.effort_only and not (setting.external and setting.external.applies_to(value))
    }
    kept.pop("model.revision", None)  # part of the digest of the base model
    return {name: value for name, value in kept.items() if not name.startswith(stage.unaffected_by)} | {
        "seed": recipe.seed
    }


class Digests:
    """Digests of stage inputs, each computed once per process."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._known: dict[tuple[str, str], str] = {}

    def of(self, given: Input) -> str:
        """Return the digest of an input; raises an `RLHFError` if the input does not exist."""
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
            raise DataError(f"{damage}", hint=f"recreate it with `rlhf run RECIPE --force {upstream}`") from None
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
        return hash_model(given.source)


def hash_model(path: str, revision: str | None = None) -> str:
    """sha256 of a model folder; of a PEFT adapter with its base, which is part of the model.

    A model on the hub is identified by its revision and the commit that this stands for, if that is known.
    """
    from rlhf_cli.models.peft_folder import find_peft_folder

    if (model := hub_model(path, revision)) is not None:
        commit = known_commit(model)
        return f"hub:{model.id}@{model.revision or 'main'}{'' if commit is None else f' {commit}'}"
    if (adapter := find_peft_folder(path)) is None:
        return hash_folder(Path(path))
    return f"{hash_folder(Path(path))} on {hash_model(adapter.base, adapter.base_revision)}"


def recall_commits(what: Identity, earlier: Identity | None) -> Identity:
    """Return an identity in which commits of the hub that are not known now are those of an earlier identity.

    Without the hub and its cache, a finished stage remains finished.
    """
    recorded = {} if earlier is None else earlier.get("inputs", {})
    inputs = {
        name: recorded[name] if "hub:" in digest and recorded.get(name, "").startswith(f"{digest} ") else digest
        for name, digest in what["inputs"].items()
    }
    return {**what, "inputs": inputs}


def identity(stage: Stage, recipe: Recipe, inputs: StageInputs, digests: Digests, pending: frozenset[str]) -> Identity:
    """Return everything the result depends on; artifacts of `pending` stages get the digest `PENDING`."""
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
    """Return the sha256 of an identity.

    Settings that are null are not part of it: a version of rlhf that adds an optional one leaves artifacts as they are.
    """
    settings = {name: value for name, value in what["settings"].items() if value is not None}
    counted = {**what, "settings": settings}
    return hashlib.sha256(json.dumps(counted, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def differences(old: Identity, new: Identity, inputs: StageInputs) -> list[str]:
    """Return one phrase per change between two identities. Pending inputs are not compared.

    Args:
        old: identity of the artifact or of the unfinished attempt.
        new: identity by the current recipe.
        inputs: inputs of `new`, for their descriptions.
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
