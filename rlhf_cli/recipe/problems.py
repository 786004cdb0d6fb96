"""Messages for pydantic's validation errors: the setting, what was expected, and the value received."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from rlhf_cli.recipe.document import KeyPath
from rlhf_cli.recipe.fields import dotted, field_at, section_at, suggestion
from rlhf_cli.recipe.overrides import Layers, key_path_of


def explain(error: ValidationError, layers: Layers) -> list[str]:
    """Return all problems of a recipe with their locations, in file order, without duplicates."""
    found: dict[str, None] = {}
    seen: dict[KeyPath, list[Any]] = {}
    for detail in error.errors(include_url=False):
        seen.setdefault(_key_path(detail["loc"]), []).append(detail)
    texts = [(key_path, text) for key_path, details in seen.items() for text in _texts(key_path, details, layers)]
    problems = [(_origin(key_path, text, layers), text) for key_path, text in texts]
    for origin, text in sorted(problems, key=lambda problem: _order(problem[0])):
        found[text if origin is None else f"{origin}: {text}"] = None
    return list(found)


def _origin(key_path: KeyPath, text: str, layers: Layers) -> str | None:
    """Return where a problem comes from: the option of the first setting named in it that the command line gives.

    A contradiction of two settings is a problem of their section, which may be a line of the file.
    """
    for name in re.findall(r"`([\w.]+)(?:: [^`]*)?`", text):
        keys = key_path_of(name)
        for named in ((*key_path, *keys), keys if len(keys) > 1 else key_path):
            origin = layers.origins.get(named, "")
            if named != key_path and origin.startswith("--") and field_at(named) is not None:
                return origin
    return layers.origin(key_path)


def _order(origin: str | None) -> tuple[int, int]:
    match = re.fullmatch(r".*:(\d+)", origin or "", re.DOTALL)
    return (0, int(match[1])) if match and not (origin or "").startswith("--") else (1, 0)


def _key_path(loc: tuple[Any, ...]) -> KeyPath:
    """Return a pydantic location as a key path, without names of union members (`lora.target_modules.str`)."""
    key_path: KeyPath = ()
    for key in loc:
        if isinstance(key, str) and section_at(key_path) is None and not _is_mapping(key_path):
            break
        key_path = (*key_path, key)
    return key_path


def _is_mapping(key_path: KeyPath) -> bool:
    field = field_at(key_path)
    return field is not None and "dict" in str(field.annotation)


def _texts(key_path: KeyPath, details: list[Any], layers: Layers) -> Iterator[str]:
    if len(details) > 1 and all(len(detail["loc"]) > len(key_path) for detail in details):  # one per type of a union
        members = dict.fromkeys(_of_member(key_path, detail) for detail in details)
        got = _shown(key_path, _value_at(key_path, layers.data), layers)
        yield f"{_name(key_path)} must be {' or '.join(members)}; got {got}"
        return
    for detail in details:
        yield _text(key_path, detail, layers)


def _of_member(key_path: KeyPath, detail: Any) -> str:
    """Return what one type of a union expects; pydantic puts the name of the type behind the key path."""
    member = str(detail["loc"][len(key_path)])
    if member.startswith("list["):
        return f"a list of {_TYPES[f'{member[5:-1]}_type']}"
    return expected(detail["type"], detail.get("ctx", {}))


def _value_at(key_path: KeyPath, data: Any) -> Any:
    for key in key_path:
        data = data[key]
    return data


def _text(key_path: KeyPath, detail: Any, layers: Layers) -> str:
    kind, context, name = detail["type"], detail.get("ctx", {}), _name(key_path)
    if kind == "extra_forbidden":
        return f"unknown setting {name}{suggestion(key_path)}"
    if kind == "missing":
        return f"{_name(key_path[:-1])} needs `{key_path[-1]}`{_meaning(key_path)}"
    if kind == "value_error":
        reason = str(context.get("error", detail["msg"]))
        return reason if not key_path else f"{name}: {reason}"
    got = _shown(key_path, detail["input"], layers)
    if kind == "string_type":
        quoted = " (quote it to make it text)" if _scalar(detail["input"]) else ""
        return f"{name} must be text; got {got}{quoted}"
    return f"{name} must be {expected(kind, context)}; got {got}"


_BOUNDS = {
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
}
_TYPES = {
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "str_type": "text",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping of names",
    "model_type": "a section with settings",
    "model_attributes_type": "a section with settings",
}


def expected(kind: str, context: Mapping[str, Any]) -> str:
    """Return what a value must be, for a kind of error of pydantic and its context."""
    if kind in _BOUNDS:
        return _BOUNDS[kind].format(**{key: _number(value) for key, value in context.items()})
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "`")
    return _TYPES.get(kind, kind.replace("_", " "))


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _name(key_path: KeyPath) -> str:
    return f"`{dotted(key_path)}`" if key_path else "the recipe"


def _meaning(key_path: KeyPath) -> str:
    field = field_at(key_path)
    if field is None or not field.description:
        return ""
    first = re.split(r"(?<=[a-z`])\. |\n", field.description.strip())[0].rstrip(".")
    return f": {first[0].lower()}{first[1:]}"


def _scalar(value: Any) -> bool:
    return not isinstance(value, dict | list) and value is not None


def _shown(key_path: KeyPath, value: Any, layers: Layers) -> str:
    """Return the value as written, shortened."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        shown = f'"{value}"'
    else:
        plain = "nothing (null)" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        shown = layers.texts.get(key_path) or plain
    shown = shown.encode("unicode_escape").decode() if not shown.isprintable() else shown
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
