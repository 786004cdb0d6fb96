"""`rlhf init`: a recipe and sample data to start from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

_PARTS = ("recipes", "data_samples")


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to fill; made if it is not there.")],
) -> None:
    """Write starter recipes and sample data into a folder, overwriting nothing."""
    from rlhf_cli.errors import DiskError, UsageError
    from rlhf_cli.progress import say

    source = _starter()
    files = [path for part in _PARTS for path in sorted((source / part).rglob("*")) if _wanted(path)]
    targets = {path: folder / path.relative_to(source) for path in files}
    if taken := [str(target) for target in targets.values() if target.exists()]:
        raise UsageError(
            f"{taken[0]} is there already ({len(taken)} of {len(targets)} files are)",
            hint="choose a new folder; init overwrites nothing",
        )
    try:
        for path, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{error.filename} is a file, where a folder has to be") from None
    except OSError as error:
        raise DiskError(f"cannot write {error.filename}: {(error.strerror or str(error)).lower()}") from error
    say(f"wrote {len(targets)} files; go on with\n\n  cd {folder}\n  rlhf run recipes/quickstart.yaml\n")
    typer.echo(folder)


def _wanted(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")


def _starter() -> Path:
    """Where the starter files are: inside the installed package, or the root of a checkout."""
    from rlhf_cli.errors import UsageError

    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "_starter", package.parent):
        if all((candidate / part).is_dir() for part in _PARTS):
            return candidate
    raise UsageError("this installation of rlhf holds no starter files", hint="install it again")
