"""Options that several commands share, declared once, and commands built from lists of options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_cli.stages.base import Flag

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
OptionalRecipe = Annotated[
    Path | None, typer.Argument(metavar="[RECIPE]", help="A recipe; without one, flags and --set say everything.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="A.B=C", help="Set one value of the recipe, parsed as YAML; repeatable.", show_default=False
    ),
]
RunDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="The run directory. Default: runs/NAME, by the recipe's name.")
]
MaxSkip = Annotated[
    float | None, typer.Option(metavar="SHARE", help="Share of records that may be skipped (`data.max_skip`).")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object of the outcome on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would run and why; change nothing.")]
Redo = Annotated[bool, typer.Option("--force", help="Run it again; discard its unfinished work.")]
Processes = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Share the work among N processes on this machine, one per GPU. Default: 1."),
]
AccelerateConfig = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Start with accelerate's launcher and this configuration: several machines."),
]

RUN_FLAGS = (
    Flag("--seed", "seed", "Seed of everything random (`seed`).", "N", kind=int),
    Flag(
        "--attention",
        "model.attention",
        "Attention backend, such as auto, tiled, triton or sdpa (`model.attention`).",
        "NAME",
    ),
    Flag("--max-skip", "data.max_skip", "Share of records that may be skipped (`data.max_skip`).", "SHARE", kind=float),
)
"""Flags of every command that runs stages."""


def parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    """A parameter of a command that is built from a list."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def parameters_of(flags: Sequence[Flag]) -> list[inspect.Parameter]:
    """One parameter per flag; None where the flag is not given."""
    found = []
    for flag in flags:
        kind: Any = list[flag.kind] if flag.repeatable else flag.kind  # type: ignore[name-defined]
        option = typer.Option(flag.option, metavar=flag.metavar, help=flag.help, show_default=False)
        found.append(parameter(flag.name, Annotated[kind | None, option]))
    return found


def with_parameters(command: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """Give a function of keyword arguments the signature that typer reads."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command
