"""Contexts for running a stage without the pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rlhf_cli.pipeline.fingerprint import settings_of
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.base import StageContext
from rlhf_cli.stages.inputs import Input
from rlhf_cli.stages.registry import stage
from tests.stops import NeverStop


def stage_context(
    name: str, recipe: Recipe, *, output: Path, work: Path, stop: Any = None, **given: Any
) -> StageContext[Any, Any]:
    """What the runner would give a stage whose inputs are `given`: field of its record -> path, or an `Input`."""
    declared = stage(name)
    record: dict[str, Any] = {}
    for field in dataclasses.fields(declared.inputs_type):
        is_many = str(field.type).startswith("tuple")
        value = given.pop(field.name, () if is_many else None)
        record[field.name] = tuple(map(_input, value)) if is_many else _input(value)
    assert not given, f"`{name}` has no inputs {sorted(given)}"
    return StageContext(
        stage=declared,
        settings=recipe.section(name),
        inputs=declared.inputs_type(**record),
        recipe=recipe,
        output=output,
        work=work,
        stop=stop or NeverStop(),
        tracked=settings_of(declared, recipe),
    )


def _input(value: Any) -> Input | None:
    if value is None or isinstance(value, Input):
        return value
    return Input("build" if value == "build" else "model", str(value))
