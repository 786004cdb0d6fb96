"""Read the JSON files of a model folder. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_cli.errors import ModelError


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty if there is no such file.

    Raises:
        ModelError: it cannot be read or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}", hint="download or copy the file again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold an object, got {type(content).__name__}", hint="download the file again")
    return content
