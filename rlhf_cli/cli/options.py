"""Flags that several commands share. Each is short for a setting of the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
Seed = Annotated[int | None, typer.Option(metavar="N", help="Seed of everything random (`seed`).")]
Attention = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Attention backend, such as auto, tiled, triton or sdpa (`model.attention`)."),
]
MaxSkip = Annotated[
    float | None, typer.Option(metavar="SHARE", help="Share of records that may be skipped (`data.max_skip`).")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object of the outcome on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would run and why; change nothing.")]
Redo = Annotated[bool, typer.Option("--force", help="Run it again, throwing unfinished work of it away.")]
Prompts = Annotated[str | None, typer.Option(metavar="DATA", help="Prompt records: a file, folder or hub data set.")]
Processes = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Share the work among N processes on this machine, one a GPU. Default: 1."),
]
AccelerateConfig = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Start by accelerate's launcher with this configuration: several machines."),
]
