"""The recipe's documentation, made from the schema: JSON schema for editors, Markdown for people."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic.fields import FieldInfo

from rlhf_cli.recipe.fields import section_of
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.recipe.show import scalar
from rlhf_cli.settings.base import EffortOnly, Section

_INTRODUCTION = """\
# The recipe

<!-- Made by `rlhf recipe reference`; do not edit. -->

A recipe is a YAML file with one section a stage; a stage without a section does not run. A bare `ppo:` runs the stage
with its defaults, `ppo: null` does not run it. Every setting can be given as `--set section.setting=value`.

YAML 1.2: `1e-6` is a number, `no` is text. A key may stand once; tags, anchors and aliases are refused.

Relative paths are looked up in the current directory first, then beside the recipe. What exists locally is local; a
name that does not exist is taken as a hub id (`owner/name`) if it looks like one.

Settings marked *effort* change memory, speed or display and not the result: they may be changed at any time, also under
a stage that is half done, and finished stages stay valid.

`rlhf recipe show RECIPE` prints every value with its origin, and the sizes that follow from them.
"""


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe; a section's bare key (`ppo:`) is allowed as in the loader."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def markdown() -> str:
    """docs/recipe.md."""
    parts = [_INTRODUCTION, _table(Recipe, "")]
    seen: set[type[Section]] = set()
    for name, field in Recipe.model_fields.items():
        if inner := section_of(field):
            parts += _chapter(name, inner, seen)
    return "\n".join(parts)


def _chapter(path: str, section: type[Section], seen: set[type[Section]]) -> list[str]:
    text = " ".join((section.__doc__ or "").split())
    if section in seen:
        return [f"## `{path}`\n", f"{text} The same settings as above.\n"]
    seen.add(section)
    parts = [f"## `{path}`\n", f"{text}\n", _table(section, path)]
    for name, field in section.model_fields.items():
        if inner := section_of(field):
            parts += _chapter(f"{path}.{name}", inner, seen)
    return parts


def _table(section: type[Section], path: str) -> str:
    rows = ["| setting | value | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        inner = section_of(field)
        kind = f"section, see [`{_joined(path, name)}`](#{_anchor(_joined(path, name))})" if inner else _kind(field)
        rows.append(f"| `{name}` | {kind} | {_default(field)} | {_meaning(field)} |")
    return "\n".join(rows) + "\n"


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _anchor(path: str) -> str:
    return path.replace(".", "")


def _meaning(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"{text} *effort*" if any(isinstance(mark, EffortOnly) for mark in field.metadata) else text


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "as below" if isinstance(default, Section) else f"`{scalar(default)}`"


def _kind(field: FieldInfo) -> str:
    return f"{_type(field.annotation)}{_bounds(field.metadata)}".replace("|", "\\|")


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{scalar(choice)}`" for choice in arguments)
    if origin is Annotated:
        return f"{_type(arguments[0])}{_bounds(arguments[1:])}"
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in arguments)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "mapping of text to text"
    return {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}[annotation]


def _bounds(marks: Any) -> str:
    words = []
    for mark in marks:
        match mark:
            case Ge():
                words.append(f">= {scalar(mark.ge)}")
            case Gt():
                words.append(f"> {scalar(mark.gt)}")
            case Le():
                words.append(f"<= {scalar(mark.le)}")
            case Lt():
                words.append(f"< {scalar(mark.lt)}")
            case MultipleOf():
                words.append(f"multiple of {scalar(mark.multiple_of)}")
    words += [
        word
        for mark in marks
        if (inner := getattr(mark, "metadata", None))
        for word in [_bounds(inner).strip()]
        if word
    ]
    return f" {', '.join(words)}" if words else ""
