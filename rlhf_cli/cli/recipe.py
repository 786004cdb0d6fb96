"""`rlhf recipe`: inspect recipes without running anything."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from rlhf_cli.cli.options import Json, RecipeFile, RunDir, Settings

app = typer.Typer(
    rich_markup_mode=None, help="Show and validate recipes; print their JSON schema.", no_args_is_help=True
)


@app.command()
def show(
    recipe: RecipeFile,
    settings: Settings = None,
    run_dir: RunDir = None,
    every: Annotated[bool, typer.Option("--all", help="Also print settings at their defaults.")] = False,
    as_json: Json = False,
) -> None:
    """Print non-default settings, derived sizes and stages.

    Each setting is printed with its origin. The output is itself a recipe. `--json` prints all settings.
    """
    from rlhf_cli.pipeline.paths import resolve_paths
    from rlhf_cli.recipe import show as view
    from rlhf_cli.recipe.loader import load_recipe

    loaded = load_recipe(recipe, settings or [])
    folder, resolved = run_dir or loaded.recipe.default_run_dir, resolve_paths(loaded, downloads=False)
    if as_json:
        typer.echo(json.dumps(view.as_json(loaded, folder, resolved), indent=2, ensure_ascii=False))
    else:
        typer.echo(view.as_yaml(loaded, folder, resolved, only_changes=not every), nl=False)


@app.command()
def validate(recipe: RecipeFile, settings: Settings = None) -> None:
    """Report all problems of a recipe at once.

    The exit code is 2 if there are any.
    """
    from rlhf_cli.progress import say
    from rlhf_cli.recipe.loader import load_recipe

    load_recipe(recipe, settings or [])
    say(f"{recipe}: no problems")


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from rlhf_cli.recipe.reference import json_schema

    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@app.command(hidden=True)
def reference() -> None:
    """Print docs/recipe.md."""
    from rlhf_cli.recipe.reference import markdown

    typer.echo(markdown(), nl=False)
