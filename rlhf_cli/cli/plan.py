"""`rlhf plan`: what a run will take, before it runs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from rlhf_cli.cli.options import Json, RecipeFile, RunDir, Settings

_FIRST = Annotated[str | None, typer.Option("--from", metavar="STAGE", help="First stage to plan.")]
_LAST = Annotated[str | None, typer.Option("--to", metavar="STAGE", help="Last stage to plan.")]
_NO_TRIAL = Annotated[
    bool, typer.Option("--no-trial", help="Measure nothing: no model is loaded, and no time is given.")
]


def plan(
    recipe: RecipeFile,
    settings: Settings = None,
    first: _FIRST = None,
    last: _LAST = None,
    run_dir: RunDir = None,
    no_trial: _NO_TRIAL = False,
    as_json: Json = False,
) -> None:
    """Estimate what each stage of a recipe will take: steps, tokens, FLOPs, memory, disk and time.

    Data is read and checked as in a run. Times come from a trial of ten to twenty seconds on this machine.
    Nothing is written.
    """
    from rlhf_cli.cli.plan_report import plan_json, show_plan
    from rlhf_cli.pipeline.plan import plan_run
    from rlhf_cli.pipeline.planner import Selection
    from rlhf_cli.recipe.loader import load_recipe

    loaded = load_recipe(recipe, settings or [])
    folder = run_dir or loaded.recipe.default_run_dir
    found = plan_run(loaded, folder, Selection(first, last), trial=not no_trial)
    if as_json:
        typer.echo(json.dumps(plan_json(found), indent=2, ensure_ascii=False))
    else:
        show_plan(found)
