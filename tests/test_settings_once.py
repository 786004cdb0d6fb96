"""Each field of a settings section is declared once: the engine takes the section, no dataclass mirrors it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import rlhf_cli
from rlhf_cli.settings.base import Section
from rlhf_cli.stages.inputs import StageInputs

MOST_IN_COMMON = 2

# Dataclasses that must carry the names of a section, with the reason.
ALLOWED = {
    "ModelSource": "the resolved form of `model` (torch dtypes and device), for any model, not only `model.path`",
    "TransformerConfig": "the file format of a model: config.json must contain every size and part",
    "ModelShape": "what config.json says of a model that exists; `BuildSettings` is of one to build",
    "RewardShape": "`objectives/` imports torch alone, so its pure functions cannot take a section",
    "AdapterBase": "stored beside an adapter: what it was trained on outlives the recipe",
    "Sampling": "the resolved form of `sampling`: nothing is left to inherit",
    "Ranking": "a record; `data.comparison` names the columns that hold its fields",
    "LabelRecord": "a record; `data.comparison` names the columns that hold its fields",
    "LabelTable": "records; `data.comparison` names the columns that hold their fields",
    "LabelPlan": "stored with a session: labels outlive the recipe under which they were made",
    "Given": "the options of `rlhf start`, from which a recipe is written",
    "EngineRun": "what a run's recipe names, loaded for another engine",
    "Draft": "checked replies to `rlhf start`, from which a recipe is written",
    "LabelChoice": "sections of the recipe that `rlhf start` writes",
}


def modules() -> Iterator[object]:
    for found in pkgutil.walk_packages(rlhf_cli.__path__, "rlhf_cli."):
        if found.name.endswith("__main__"):
            continue
        try:
            yield importlib.import_module(found.name)
        except ModuleNotFoundError as error:  # an optional dependency, such as Triton
            if (error.name or "").startswith("rlhf_cli"):
                raise


def defined_classes() -> list[type]:
    return [
        value
        for module in modules()
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__
    ]


def sections(classes: list[type]) -> dict[str, set[str]]:
    return {one.__name__: set(one.model_fields) for one in classes if issubclass(one, Section) and one is not Section}


def mirrors(classes: list[type]) -> dict[str, list[str]]:
    """Name of a dataclass -> the sections of which it repeats more than `MOST_IN_COMMON` fields, with the fields."""
    found: dict[str, list[str]] = {}
    for one in classes:
        if not dataclasses.is_dataclass(one) or issubclass(one, StageInputs):  # inputs are what settings name
            continue
        names = {field.name for field in dataclasses.fields(one)}
        for section, fields in sections(classes).items():
            if len(common := names & fields) > MOST_IN_COMMON:
                found.setdefault(one.__name__, []).append(f"{section}: {', '.join(sorted(common))}")
    return found


def test_no_dataclass_repeats_the_fields_of_a_section():
    found = mirrors(defined_classes())
    assert {name: repeated for name, repeated in found.items() if name not in ALLOWED} == {}
    assert ALLOWED.keys() <= found.keys(), "an exception that is no longer needed"


def test_a_mirror_would_be_found():
    class Sampled(Section):
        temperature: float = 1.0
        top_p: float = 1.0
        max_new_tokens: int = 1

    @dataclasses.dataclass
    class Mirror:
        temperature: float
        top_p: float
        max_new_tokens: int
        seed: int

    @dataclasses.dataclass
    class Other:
        temperature: float
        top_p: float

    assert mirrors([Sampled, Mirror, Other]) == {"Mirror": ["Sampled: max_new_tokens, temperature, top_p"]}
