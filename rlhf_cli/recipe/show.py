"""`recipe show`: settings with their origins, as a YAML recipe: those that differ from the defaults, or all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rlhf_cli.recipe.document import KeyPath, plain_scalar
from rlhf_cli.recipe.fields import dotted, values
from rlhf_cli.recipe.loader import LoadedRecipe
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.base import Section
from rlhf_cli.stages.base import section_of
from rlhf_cli.stages.registry import REGISTRY, stages

_NOTE_COLUMN = 44
_PLAIN = re.compile(r"[A-Za-z0-9_./~][\w./~@+-]*(:[\w./~@+-]+)*( [\w./~@+-]+)*")
"""Text that needs no quotes, in block and flow style; all other text is quoted."""


def as_json(loaded: LoadedRecipe, run_dir: Path, resolved: Recipe | None = None) -> dict[str, Any]:
    """Return settings, origin of each leaf, derived sizes, run directory and stages that run.

    Args:
        loaded: the recipe.
        run_dir: of the run.
        resolved: the recipe with paths valid from here, to derive sizes from files; None looks where the recipe says.
    """
    recipe = loaded.recipe
    return {
        "settings": recipe.model_dump(mode="json"),
        "origins": {dotted(key_path): loaded.origin(key_path) for key_path, _, _ in values(recipe)},
        "derived": derived_sizes(resolved or recipe),
        "run_dir": str(run_dir),
        "stages": [stage.name for stage in stages() if recipe.section(stage.name) is not None],
    }


def as_yaml(loaded: LoadedRecipe, run_dir: Path, resolved: Recipe | None = None, *, only_changes: bool = False) -> str:
    """Return a valid recipe whose comments give the origin of each value and the derived sizes.

    Args:
        loaded: the recipe.
        run_dir: of the run.
        resolved: see `as_json`.
        only_changes: omit values that are the defaults; the text is the same recipe.
    """
    recipe = loaded.recipe
    lines = _section(recipe, (), loaded, only_changes=only_changes)
    running = [stage.name for stage in stages() if recipe.section(stage.name) is not None]
    absent = [name for name in REGISTRY if name not in running]
    lines += ["", "# derived sizes"]
    for section, rows in derived_sizes(resolved or recipe).items():
        lines += [
            f"#   {section}: {quantity}: {f'{size:,}' if isinstance(size, int) else size}"
            for quantity, size in rows.items()
        ]
    lines += ["", f"# stages to run: {', '.join(running) or 'none'}"]
    if absent:
        lines.append(f"# stages without a section, not run: {', '.join(absent)}")
    lines.append(f"# output: {run_dir}/STAGE/")
    return "\n".join(lines) + "\n"


def derived_sizes(recipe: Recipe) -> dict[str, dict[str, int | str]]:
    """Return section -> quantity -> value: sizes derived from the settings of the stages that run."""
    found = {}
    for stage in stages():
        section = recipe.section(stage.name)
        if section is not None and (sizes := stage.sizes(section, recipe)):
            found[stage.section] = dict(sizes)
    return found


def _section(section: Section, key_path: KeyPath, loaded: LoadedRecipe, *, only_changes: bool) -> list[str]:
    lines: list[str] = []
    indent = "  " * len(key_path)
    for name, field in type(section).model_fields.items():
        value, here = getattr(section, name), (*key_path, name)
        if only_changes and not field.is_required() and value == field.get_default(call_default_factory=True):
            continue
        if isinstance(value, Section):
            inner = _section(value, here, loaded, only_changes=only_changes)
            head = f"{indent}{name}:" if inner else f"{indent}{name}: {{}}"
            lines += [*([] if key_path else [""]), head, *inner]
        elif isinstance(value, list) and value and isinstance(value[0], Section):
            lines.append(f"{indent}{name}:")
            for index, entry in enumerate(value):
                inner = _section(entry, (*here, index), loaded, only_changes=only_changes) or ["{}"]
                dash = "  " * (len(here))
                lines += [
                    f"{dash}- {line.strip()}" if n == 0 else f"{dash}  {line.strip()}" for n, line in enumerate(inner)
                ]
        elif key_path or name not in map(section_of, REGISTRY):
            lines.append(_noted(f"{indent}{name}: {scalar(value)}", loaded.origin(here)))
    return lines


def _noted(line: str, origin: str) -> str:
    return f"{line:<{_NOTE_COLUMN}}  # {' '.join(origin.split())}"


def scalar(value: Any) -> str:
    """Return a value in YAML flow style; parsing it gives the same value."""
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and plain_scalar(value) == value else _quoted(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(key)}: {scalar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(scalar, value))}]"
    if value is None:
        return "null"
    return json.dumps(value) if isinstance(value, bool) else repr(value)


def _quoted(text: str) -> str:
    escaped = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped)
