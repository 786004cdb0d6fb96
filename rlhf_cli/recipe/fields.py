"""Lookup in the recipe schema: sections, settings, their marks, and suggestions for unknown settings."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rlhf_cli.recipe.document import Key, KeyPath
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.base import EffortOnly, External, Section


def dotted(key_path: KeyPath) -> str:
    """Return a key path as written in `--set`, such as `ppo.rewards.0.weight`."""
    return ".".join(str(key) for key in key_path)


def section_of(field: FieldInfo) -> type[Section] | None:
    """Return the section type of a field: directly, in a union or in a list; None for other fields."""
    return _section_in(field.annotation)


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, list):
        return next((found for part in get_args(annotation) if (found := _section_in(part))), None)
    return None


def is_section(key_path: KeyPath) -> bool:
    """Whether a key path leads to a single section (not a list of sections)."""
    field = field_at(key_path)
    return field is not None and section_of(field) is not None and not is_list(field)


def is_list(field: FieldInfo) -> bool:
    """Whether a field is a list, directly or in a union."""
    parts = (field.annotation, *get_args(field.annotation))
    return any(get_origin(part) is list for part in parts)


def field_at(key_path: KeyPath) -> FieldInfo | None:
    """Return the field at a key path, ignoring list indices; None if the schema has none."""
    section: type[Section] | None = Recipe
    field: FieldInfo | None = None
    for key in key_path:
        if isinstance(key, int):
            continue
        field = section.model_fields.get(key) if section is not None else None
        if field is None:
            return None
        section = section_of(field)
    return field


def section_at(key_path: KeyPath) -> type[Section] | None:
    """Return the section at a key path; `Recipe` at the top, None if there is none."""
    if not key_path:
        return Recipe
    field = field_at(key_path)
    return None if field is None else section_of(field)


@dataclass(frozen=True)
class Setting:
    """One setting of the schema: its key path and its field."""

    key_path: KeyPath
    field: FieldInfo

    @property
    def external(self) -> External | None:
        """What the setting names outside the recipe, if anything."""
        return next((mark for mark in self.field.metadata if isinstance(mark, External)), None)

    @property
    def effort_only(self) -> bool:
        """Whether the setting affects only memory, speed or display."""
        return any(isinstance(mark, EffortOnly) for mark in self.field.metadata)


def walk(section: type[Section] = Recipe, key_path: KeyPath = ()) -> Iterator[Setting]:
    """Yield all settings of the schema, including sections; entries of a list have the key path of the list."""
    for name, field in section.model_fields.items():
        yield Setting((*key_path, name), field)
        if inner := section_of(field):
            yield from walk(inner, (*key_path, name))


def values(section: Section, key_path: KeyPath = ()) -> Iterator[tuple[KeyPath, Setting, Any]]:
    """Yield (key path, setting, value) of every leaf of a loaded section; list entries are numbered."""
    for name, field in type(section).model_fields.items():
        here = (*key_path, name)
        yield from _leaves(getattr(section, name), here, Setting(here, field))


def _leaves(value: Any, key_path: KeyPath, setting: Setting) -> Iterator[tuple[KeyPath, Setting, Any]]:
    if isinstance(value, Section):
        yield from values(value, key_path)
    elif isinstance(value, list) and value and isinstance(value[0], Section):
        for index, entry in enumerate(value):
            yield from values(entry, (*key_path, index))
    else:
        yield key_path, setting, value


RENAMED = {
    "model.quantise": "model.quantize",
    "train_rm.normalise": "train_rm.normalize",
    "label.choose": "label.active_learning",
    "label.human.merge": "label.human.aggregation",
}
"""Former name of a setting -> its name now, both dotted. Former names are refused, with the new name in the message."""


def suggestion(key_path: KeyPath) -> str:
    """Return a suggestion for an unknown setting, as the end of a sentence; empty if nothing is similar."""
    *_, key = key_path
    if (renamed := RENAMED.get(dotted(key_path))) is not None:
        return f", which was renamed: did you mean `{renamed}`?"
    section = section_at(key_path[:-1])
    if section is None:
        return ""
    known = list(section.model_fields)
    if longer := [name for name in known if name.startswith(f"{key}_") or _initials(name) == key]:
        return f", did you mean {_either([f'`{name}`' for name in longer])}?"
    if homes := _homes(key):
        return f"; it belongs under {_either(homes)}"
    if near := difflib.get_close_matches(str(key), known, n=1, cutoff=0.6):
        return f", did you mean `{near[0]}`?"
    if len(known) <= 8:
        return f"; known here: {', '.join(f'`{name}`' for name in known)}"
    return ""


def _homes(key: Key) -> list[str]:
    """Return the sections that have a setting of this name; `the top level` for the recipe itself."""
    key_paths = [setting.key_path for setting in walk() if setting.key_path[-1] == key]
    return [f"`{dotted(key_path[:-1])}`" if len(key_path) > 1 else "the top level" for key_path in key_paths]


def _initials(name: str) -> str:
    return "".join(word[0] for word in name.split("_")) if "_" in name else ""


def _either(homes: list[str]) -> str:
    return homes[0] if len(homes) == 1 else f"{', '.join(homes[:-1])} or {homes[-1]}"
