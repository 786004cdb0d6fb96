"""Options shared by several commands, and functions that build commands from lists of options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_cli.stages.base import Flag

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe, a YAML file.")]
OptionalRecipe = Annotated[
    Path | None, typer.Argument(metavar="[RECIPE]", help="Recipe, a YAML file; optional if options give all settings.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override a recipe setting; repeatable.", show_default=False),
]


def _with_home(path: Path | None) -> Path | None:
    """Expand `~`, which shells leave as it is in `--run-dir=~/runs`."""
    return None if path is None else path.expanduser()


RunDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Run directory; default: runs/NAME.", callback=_with_home)
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
