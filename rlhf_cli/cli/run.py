"""`rlhf run`: all stages of a recipe."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rlhf_cli.cli import options
from rlhf_cli.cli.completion import stages
from rlhf_cli.cli.stage_command import run_parameters, run_stages
from rlhf_cli.stages.base import Flag

_FLAGS = (
    Flag("--model", "model.path", "Base model: a folder or hub id.", "MODEL"),
    Flag("--data", "sft.data", "Demonstrations: a file, folder or hub data set.", "DATA"),
    Flag("--prompts", "data.prompts", "Prompts: a file, folder or hub data set.", "DATA"),
)
_FIRST = Annotated[str | None, typer.Option("--from", metavar="STAGE", help="First stage.", autocompletion=stages)]
_LAST = Annotated[str | None, typer.Option("--to", metavar="STAGE", help="Last stage.", autocompletion=stages)]
_FORCE = Annotated[
    list[str] | None,
    typer.Option(
        "--force",
        metavar="STAGE",
        help="Run this stage again; repeatable.",
        show_default=False,
        autocompletion=stages,
    ),
]


def run(**given: Any) -> None:
    """Run the stages of a recipe. Unchanged finished stages are skipped, and an interrupted stage is resumed."""
    run_stages(given, _FLAGS, first=given["first"], last=given["last"])


options.with_parameters(
    run,
    [
        options.parameter("recipe", options.RecipeFile, default=...),
        options.parameter("settings", options.Settings),
        *options.parameters_of(_FLAGS),
        options.parameter("first", _FIRST),
        options.parameter("last", _LAST),
        *run_parameters(options.parameter("force", _FORCE)),
    ],
)
