"""What the schema knows about its own settings: which place is a section, what a setting names, what it affects."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rlhf_cli.recipe.document import Key, Place
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.base import EffortOnly, Names, Section


def dotted(place: Place) -> str:
    """A place as people write it in `--set`: `ppo.rewards.0.weight`."""
    return ".".join(str(key) for key in place)


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section a field holds, directly or as one of several possibilities or list entries."""
    return _section_in(field.annotation)


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, list):
        return next((found for part in get_args(annotation) if (found := _section_in(part))), None)
    return None


def is_section(place: Place) -> bool:
    """Whether a place holds one section (not a list of them)."""
    field = field_at(place)
    return field is not None and section_of(field) is not None and not _is_list(field)


def _is_list(field: FieldInfo) -> bool:
    parts = (field.annotation, *get_args(field.annotation))
    return any(get_origin(part) is list for part in parts)


def field_at(place: Place) -> FieldInfo | None:
    """The field that a place names, list indices passed over; None where the schema has none."""
    section: type[Section] | None = Recipe
    field: FieldInfo | None = None
    for key in place:
        if isinstance(key, int):
            continue
        field = section.model_fields.get(key) if section is not None else None
        if field is None:
            return None
        section = section_of(field)
    return field


def section_at(place: Place) -> type[Section] | None:
    """The section whose settings stand at a place; `Recipe` at the top."""
    if not place:
        return Recipe
    field = field_at(place)
    return None if field is None else section_of(field)


@dataclass(frozen=True)
class Setting:
    """One setting of the schema: where it stands and its field."""

    place: Place
    field: FieldInfo

    @property
    def names(self) -> Names | None:
        """What outside the recipe it names, if anything."""
        return next((mark for mark in self.field.metadata if isinstance(mark, Names)), None)

    @property
    def effort_only(self) -> bool:
        """Whether it changes memory, speed or display alone."""
        return any(isinstance(mark, EffortOnly) for mark in self.field.metadata)


def walk(section: type[Section] = Recipe, place: Place = ()) -> Iterator[Setting]:
    """All settings of the schema, sections included; entries of a list of sections stand under the list's own place."""
    for name, field in section.model_fields.items():
        yield Setting((*place, name), field)
        if inner := section_of(field):
            yield from walk(inner, (*place, name))


def values(section: Section, place: Place = ()) -> Iterator[tuple[Place, Setting, Any]]:
    """(place, setting, value) of every leaf of a loaded section; entries of lists of sections by their index."""
    for name, field in type(section).model_fields.items():
        here = (*place, name)
        yield from _leaves(getattr(section, name), here, Setting(here, field))


def _leaves(value: Any, place: Place, setting: Setting) -> Iterator[tuple[Place, Setting, Any]]:
    if isinstance(value, Section):
        yield from values(value, place)
    elif isinstance(value, list) and value and isinstance(value[0], Section):
        for index, entry in enumerate(value):
            yield from values(entry, (*place, index))
    else:
        yield place, setting, value


def suggestion(place: Place) -> str:
    """What an unknown setting was probably meant to be, as the end of a sentence; empty where nothing is near."""
    *_, key = place
    section = section_at(place[:-1])
    if section is None:
        return ""
    known = list(section.model_fields)
    if homes := _homes(key):
        return f"; it belongs under {_either(homes)}"
    if near := difflib.get_close_matches(str(key), known, n=1, cutoff=0.6):
        return f", did you mean `{near[0]}`?"
    if len(known) <= 8:
        return f"; known here: {', '.join(f'`{name}`' for name in known)}"
    return ""


def _homes(key: Key) -> list[str]:
    """Sections that do have a setting of this name; `the top level` for the recipe's own."""
    places = [setting.place for setting in walk() if setting.place[-1] == key]
    return [f"`{dotted(place[:-1])}`" if len(place) > 1 else "the top level" for place in places]


def _either(homes: list[str]) -> str:
    return homes[0] if len(homes) == 1 else f"{', '.join(homes[:-1])} or {homes[-1]}"
