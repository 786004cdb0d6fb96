"""The line and the file by which editors complete and check the settings of a recipe."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_cli.files import write_whole
from rlhf_cli.recipe.reference import json_schema

FILE_NAME = "recipe.schema.json"
_ID = "urn:rlhf-cli:recipe:"


def schema_line(schema: str = FILE_NAME) -> str:
    """Return the first line of a recipe, which YAML language servers read.

    Args:
        schema: path of the schema, relative to the recipe.
    """
    return f"# yaml-language-server: $schema={schema}\n"


def write_schema(folder: Path) -> bool:
    """Write the JSON schema of recipes to a folder, in place of an earlier one.

    Returns:
        Whether it is there: another file of that name stays as it is.

    Raises:
        OSError: the disk cannot be written.
    """
    path = folder / FILE_NAME
    if path.exists() and not _is_ours(path):
        return False
    write_whole(path, json.dumps(json_schema(), indent=2) + "\n")
    return True


def _is_ours(path: Path) -> bool:
    try:
        return json.loads(path.read_bytes())["$id"].startswith(_ID)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
