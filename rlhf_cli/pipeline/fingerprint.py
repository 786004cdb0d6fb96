"""What a stage's result depends on, hashed: equal fingerprints mean that the work need not be done again.

Settings marked `EffortOnly` in the schema stay out: someone who ran out of memory lowers `micro_batch_size` and goes on
from the last checkpoint. Names of files stay out too, since what counts is their content (docs/decisions/0001).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rlhf_cli.errors import DataError
from rlhf_cli.files import hash_file, hash_folder
from rlhf_cli.pipeline.inputs import Input
from rlhf_cli.pipeline.manifest import DamagedArtifact, Identity
from rlhf_cli.pipeline.paths import check_critic, check_data, check_file, check_model, function_file
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.recipe.fields import dotted, values
from rlhf_cli.recipe.schema import LabelSettings, Recipe
from rlhf_cli.stages.base import Stage

PENDING = "pending"
"""Digest of an artifact that an earlier stage is still to write."""


def settings_of(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """Dotted settings that the stage's result depends on, its own and the shared ones that reach it."""
    section = getattr(recipe, stage.section)
    places = [*values(section, (stage.section,)), *values(recipe.data, ("data",))]
    if not (isinstance(section, LabelSettings) and not section.loads_a_model):  # which loads no model
        places += values(recipe.model, ("model",))
    kept = {
        dotted(place): value
        for place, setting, value in places
        if not setting.effort_only and not (setting.names and setting.names.leads_out(value))
    }
    kept.pop("model.revision", None)  # is part of the base model's digest
    if stage.name in ("label", "evaluate"):
        kept.pop("model.quantize", None)  # which is for weights under an adapter that trains
    if stage.name != "sft":
        kept = {name: value for name, value in kept.items() if not name.startswith("model.build")}
    return kept | {"seed": recipe.seed}


class Digests:
    """Hashes of everything stages read, each made once a process."""

    def __init__(self, recipe: Recipe, run: RunDirectory) -> None:
        self._recipe = recipe
        self._run = run
        self._known: dict[tuple[str, str], str] = {}

    def of(self, given: Input) -> str:
        """Digest of one input; raises an `RLHFError` where there is nothing to hash."""
        if given.what == "artifact":
            return self._artifact(given)
        key = (given.what, given.source)
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
        if given.what == "build":
            return "build"
        if given.what == "function":
            file = function_file(given.source, given.setting)
            return f"{hash_file(file)}:{given.source.rpartition(':')[2]}"
        if given.what == "data":
            check_data(given.source, given.setting)
            from rlhf_cli.data.sources import source_digest

            return source_digest(given.source)
        if given.what == "file":
            check_file(given.source, given.setting)
            return hash_file(Path(given.source))
        if given.what == "critic":
            check_critic(given.source, given.setting)
            return hash_folder(Path(given.source))
        check_model(given.source, given.setting)
        if Path(given.source).is_dir():
            return hash_folder(Path(given.source))
        revision = self._recipe.model.revision if given.source == self._recipe.model.path else None
        return f"hub:{given.source}@{revision or 'main'}"


def identity(stage: Stage, recipe: Recipe, inputs: list[Input], digests: Digests, pending: frozenset[str]) -> Identity:
    """Everything the result depends on; artifacts of `pending` stages count as not yet known."""
    return {
        "stage": stage.name,
        "settings": settings_of(stage, recipe),
        "inputs": {
            given.name: PENDING if given.upstream in pending else digests.of(given) for given in inputs if given.matters
        },
    }


def fingerprint(what: Identity) -> str:
    """sha256 of an identity."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def differences(old: Identity, new: Identity) -> list[str]:
    """What changed, one phrase each, in the words of the recipe. Inputs still pending are not compared."""
    found = []
    before, after = old.get("settings", {}), new["settings"]
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            found.append(f"`{name}` was {_shown(before, name)}, now {_shown(after, name)}")
    before, after = old.get("inputs", {}), new["inputs"]
    for name in sorted(before.keys() | after.keys()):
        if PENDING not in (before.get(name), after.get(name)) and before.get(name) != after.get(name):
            found.append(f"{_input(name)} changed")
    return found


def _shown(settings: dict[str, Any], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else "not set"


def _input(name: str) -> str:
    known = {"base": "the base model", "prompts": "the content of the prompts", "sft": "the SFT model"}
    known |= {"train-rm": "the reward model", "label": "the rankings", "ppo": "the PPO policy"}
    return known.get(name, f"the content of `{name}`")
