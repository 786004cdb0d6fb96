"""Options shared by several commands, and functions that build commands from lists of options."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_cli.cli.completion import COMPLETE, recipes, run_directories
from rlhf_cli.stages.base import Flag


def _recipe(argument: str) -> Any:
    """Return the file or the text of a recipe; a shell that completes a command line reads nothing."""
    if COMPLETE in os.environ:
        return Path(argument)
    from rlhf_cli.recipe.source import recipe_source

    return recipe_source(argument)


_A_RECIPE = "Recipe: a YAML file, an https address, or - for stdin"
RecipeFile = Annotated[
    Any, typer.Argument(metavar="RECIPE", help=f"{_A_RECIPE}.", parser=_recipe, autocompletion=recipes)
]
OptionalRecipe = Annotated[
    Any,
    typer.Argument(
        metavar="[RECIPE]",
        help=f"{_A_RECIPE}; optional if options give all settings.",
        parser=_recipe,
        autocompletion=recipes,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override a recipe setting; repeatable.", show_default=False),
]


RunArgument = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Run directory, such as runs/quickstart.", autocompletion=run_directories),
]


def _with_home(path: Path | None) -> Path | None:
    """Expand `~`, which shells leave as it is in `--run-dir=~/runs`."""
    return None if path is None else path.expanduser()


RunDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Run directory; default: runs/NAME.", callback=_with_home, autocompletion=run_directories
    ),
]
MaxSkip = Annotated[float | None, typer.Option(metavar="SHARE", help="Maximum share of records to skip.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would run and why; change nothing.")]
Redo = Annotated[bool, typer.Option("--force", help="Run again from the start; discard unfinished work.")]
Processes = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Number of processes, one per GPU."),
]
AccelerateConfig = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Run on several machines with `accelerate launch`."),
]

RUN_FLAGS = (
    Flag("--seed", "seed", "Random seed.", "N", kind=int),
    Flag(
        "--attention",
        "model.attention",
        "Attention backend, such as auto, triton or sdpa.",
        "NAME",
    ),
    Flag("--remote", "remote", "Copy of the run in object storage, such as s3://bucket/runs/mine.", "URL"),
    Flag("--max-skip", "data.max_skip", "Maximum share of records to skip.", "SHARE", kind=float),
)
"""Flags of every command that runs stages."""


def parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    """Return a keyword parameter of a command."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def parameters_of(flags: Sequence[Flag]) -> list[inspect.Parameter]:
    """Return one parameter per flag; its value is None if the flag is not given."""
    found = []
    for flag in flags:
        kind: Any = list[flag.kind] if flag.repeatable else flag.kind  # type: ignore[name-defined]
        option = typer.Option(flag.option, metavar=flag.metavar, help=flag.help, show_default=False)
        found.append(parameter(flag.name, Annotated[kind | None, option]))
    return found


def with_parameters(command: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """Give a function with `**kwargs` the signature that typer reads."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command
