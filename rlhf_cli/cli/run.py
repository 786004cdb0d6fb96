"""`rlhf run`: all stages of a recipe."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rlhf_cli.cli import options
from rlhf_cli.cli.stage_command import run_parameters, run_stages
from rlhf_cli.stages.base import Flag

_FLAGS = (
    Flag("--model", "model.path", "Base model (`model.path`).", "MODEL"),
    Flag("--data", "sft.data", "Demonstrations (`sft.data`).", "DATA"),
    Flag("--prompts", "data.prompts", "Prompt records: a file, folder or hub data set (`data.prompts`).", "DATA"),
)
_FIRST = Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Take earlier stages as they are.")]
_LAST = Annotated[str | None, typer.Option("--to", metavar="STAGE", help="Stop after this stage.")]
_FORCE = Annotated[
    list[str] | None,
    typer.Option("--force", metavar="STAGE", help="Run it again, done or not; repeatable.", show_default=False),
]


def run(**given: Any) -> None:
    """Run the stages of a recipe and resume where it stopped; finished stages that did not change are skipped."""
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
