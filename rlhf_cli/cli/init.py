"""`rlhf init`: write a recipe for a model and prompts, or starter recipes and sample data."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_cli.cli import options
from rlhf_cli.cli.start import CHOICES

_PARTS = ("recipes", "data_samples")
_PATH = Annotated[
    Path | None, typer.Argument(metavar="[RECIPE|DIR]", help="Recipe to write; or, without options, a folder.")
]


def init(**given: Any) -> None:
    """Write a recipe for your model and prompts, or, without options, starter recipes and sample data to a folder.

    \b
      a recipe, with completions that you rank:
        rlhf init mine.yaml --model MODEL --prompts FILE
      starter recipes and sample data:
        rlhf init DIR

    Model and data are checked first. With `--labels`, `--judge` or `--reward`, you rank nothing. An existing
    recipe is replaced only with --force, starter files never. `rlhf start` asks for the same in a dialogue.
    """
    from rlhf_cli.cli.start import write
    from rlhf_cli.errors import UsageError
    from rlhf_cli.progress import say

    path: Path | None = given["path"]
    if given["model"] is not None and given["prompts"] is not None:
        write(given, path or Path("mine.yaml"))
        return
    if any(given[one.name] for one in CHOICES):
        raise UsageError(
            "a recipe needs `--model` and `--prompts`", hint="give both; `rlhf start` asks for what is missing"
        )
    if path is None:
        raise UsageError(
            "name a folder for starter recipes and sample data, or give `--model` and `--prompts`",
            hint="rlhf init my-run, or rlhf init mine.yaml --model MODEL --prompts FILE, or rlhf start",
        )
    count = write_starter(path)
    say(f"wrote {count} files; next, run\n\n  cd {path}\n  rlhf run recipes/quickstart.yaml\n")
    typer.echo(path)


def write_starter(folder: Path) -> int:
    """Write the starter files to a folder, and return their number.

    Raises:
        UsageError: one of them exists, or this installation has none.
        DiskError: a file cannot be written.
    """
    from rlhf_cli.errors import DiskError, UsageError
    from rlhf_cli.recipe.editor_schema import FILE_NAME, schema_line, write_schema

    source = _starter_folder()
    files = [path for part in _PARTS for path in sorted((source / part).rglob("*")) if _is_starter_file(path)]
    targets = {path: folder / path.relative_to(source) for path in files}
    count = len(targets) + 1
    if taken := [str(target) for target in (*targets.values(), folder / FILE_NAME) if target.exists()]:
        raise UsageError(
            f"{taken[0]} already exists ({len(taken)} of {count} files exist)",
            hint="use a new folder; starter files are never overwritten",
        )
    try:
        for path, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            if path.parent.name == "recipes":
                line = schema_line(f"../{FILE_NAME}")
                target.write_text(line + path.read_text(encoding="utf-8"), encoding="utf-8")
        write_schema(folder)
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


options.with_parameters(init, [options.parameter("path", _PATH), *CHOICES])
