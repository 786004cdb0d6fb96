"""`rlhf quickstart`: the whole pipeline on a tiny model, from the installed package alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_cli.cli import options
from rlhf_cli.cli.init import write_starter
from rlhf_cli.cli.stage_command import run_stages

_RECIPE = Path("recipes", "quickstart.yaml")
_DIR = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of the recipe, its data and the run; created if missing.")
]

_DRY_RUN = Annotated[bool, typer.Option("--dry-run", help="Write the recipe and data, and show what would run.")]


def quickstart(**given: Any) -> None:
    """Run the whole pipeline on a tiny model, in two to four minutes on two CPU cores.

    It writes starter recipes and sample data to DIR, as `rlhf init` does, and runs DIR/recipes/quickstart.yaml, which
    needs no GPU, network or model hub. The same command resumes an interrupted run.
    """
    folder: Path = given["folder"]
    recipe = folder / _RECIPE
    if not recipe.is_file():
        write_starter(folder)
    absent = {"first": None, "last": None, "force": None, "as_json": False, "processes": None}
    run_dir = folder / "runs" / "quickstart"
    run_stages({**given, **absent, "recipe": recipe, "run_dir": run_dir, "accelerate_config": None}, ())


options.with_parameters(
    quickstart,
    [
        options.parameter("folder", _DIR, default=Path("rlhf-quickstart")),
        options.parameter("settings", options.Settings),
        options.parameter("dry_run", _DRY_RUN, default=False),
    ],
)
