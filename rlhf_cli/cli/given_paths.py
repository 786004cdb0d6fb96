"""Which paths the user gave to the command: its arguments, and the values of recipes that are among them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def is_given(path: str | bytes | int) -> bool:
    """Whether a path, or a folder above it, is an argument of the command or a value of its recipe.

    What rlhf writes itself into a run directory is not given, unless the run directory itself is gone.
    """
    if isinstance(path, int):
        return False
    try:
        named, given = _absolute(os.fsdecode(path)), {_absolute(one) for one in _values() if one}
        return named in given or any(one in given and not (one / ".lock").exists() for one in named.parents)
    except OSError:  # the working directory was removed, or a folder may not be read
        return True


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  (recipes hold values that `resolve` cannot read as a path)


def _values() -> Iterator[str]:
    for argument in sys.argv[1:]:
        value = argument.rpartition("=")[2]  # of `--run-dir=PATH` and `--set model.path=PATH`
        yield from (argument, value)
        if value.endswith((".yaml", ".yml")):
            yield from _strings(_content(value))


def _content(recipe: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for one in content.values() if isinstance(content, dict) else content:
            yield from _strings(one)
