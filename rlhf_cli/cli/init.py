"""`rlhf init`: write starter recipes and sample data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

_PARTS = ("recipes", "data_samples")
_SCHEMA = "recipe.schema.json"
_SCHEMA_LINE = f"# yaml-language-server: $schema=../{_SCHEMA}\n"
"""First line of a recipe, by which editors check and complete settings."""


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write to; created if missing.")],
) -> None:
    """Write starter recipes and sample data to a folder; existing files are never overwritten."""
    from rlhf_cli.progress import say

    count = write_starter(folder)
    say(f"wrote {count} files; next, run\n\n  cd {folder}\n  rlhf run recipes/quickstart.yaml\n")
    typer.echo(folder)


def write_starter(folder: Path) -> int:
    """Write the starter files to a folder, and return their number.

    Raises:
        UsageError: one of them exists, or this installation has none.
        DiskError: a file cannot be written.
    """
    from rlhf_cli.errors import DiskError, UsageError
    from rlhf_cli.recipe.reference import json_schema

    source = _starter_folder()
    files = [path for part in _PARTS for path in sorted((source / part).rglob("*")) if _is_starter_file(path)]
    targets = {path: folder / path.relative_to(source) for path in files}
    count = len(targets) + 1
    if taken := [str(target) for target in (*targets.values(), folder / _SCHEMA) if target.exists()]:
        raise UsageError(
            f"{taken[0]} already exists ({len(taken)} of {count} files exist)",
            hint="use a new folder; `rlhf init` never overwrites files",
        )
    try:
        for path, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            if path.parent.name == "recipes":
                target.write_text(_SCHEMA_LINE + path.read_text(encoding="utf-8"), encoding="utf-8")
        (folder / _SCHEMA).write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{error.filename} must be a folder, but is a file") from None
    except OSError as error:
        raise DiskError(f"cannot write {error.filename}: {(error.strerror or str(error)).lower()}") from error
    return count


def _is_starter_file(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")


def _starter_folder() -> Path:
    """Find the folder of the starter files: inside the installed package, or the root of a checkout."""
    from rlhf_cli.errors import UsageError

    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "_starter", package.parent):
        if all((candidate / part).is_dir() for part in _PARTS):
            return candidate
    raise UsageError("this installation of rlhf contains no starter files", hint="reinstall rlhf-cli")
