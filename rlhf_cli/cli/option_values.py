"""Values that options of numbers refuse, in the words in which a recipe refuses them.

Recent versions of typer read values with pydantic, earlier ones with click; each has messages of its own.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

_READ_AS = {"int_parsing": "int_type", "int_from_float": "int_type", "float_parsing": "float_type"}
"""What pydantic says of text that is not a number -> what it says of a value of a recipe."""
_KINDS = {
    "int_type",
    "float_type",
    "finite_number",
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
}
_OF_CLICK = {
    "integer": "a whole number",
    "integer range": "a whole number",
    "float": "a number",
    "float range": "a number",
}


def refused_number(error: BaseException) -> str | None:
    """Return what is wrong with the value of an option that is a number; None for other errors of a command line."""
    option = next(iter(getattr(getattr(error, "param", None), "opts", ())), None)
    if option is None:
        return None
    found = _of_pydantic(error.__cause__) if isinstance(error.__cause__, ValidationError) else _of_click(error)
    return None if found is None else f"`{option}` must be {found[0]}; got {found[1] or 'nothing'}"


def _of_pydantic(error: ValidationError) -> tuple[str, str] | None:
    """Return what is expected, and the value."""
    from rlhf_cli.recipe.problems import expected

    detail = error.errors(include_url=False)[0]
    kind = _READ_AS.get(detail["type"], detail["type"])
    return (expected(kind, detail.get("ctx", {})), str(detail["input"])) if kind in _KINDS else None


def _of_click(error: BaseException) -> tuple[str, str] | None:
    """The same of click, whose message begins with the value."""
    kind: Any = getattr(getattr(error, "param", None), "type", None)
    words = _OF_CLICK.get(getattr(kind, "name", ""))
    given = re.match(r"'?(.*?)'? is not \w+ (valid|the range)", getattr(error, "message", ""), re.DOTALL)
    if words is None or given is None:
        return None
    if given[2] == "valid":
        return words, given[1]
    bound = f"at least {kind.min:g}" if kind.min is not None and float(given[1]) < kind.min else f"at most {kind.max:g}"
    return bound, given[1]
