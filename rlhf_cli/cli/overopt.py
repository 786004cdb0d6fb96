"""`rlhf overopt`: how far a reward model of a given size can be optimized before quality falls."""

from __future__ import annotations

from pathlib import Path

import typer

from rlhf_cli.cli.options import Json, RecipeFile, RunDir, Settings


def overopt(recipe: RecipeFile, settings: Settings = None, run_dir: RunDir = None, as_json: Json = False) -> None:
    """Train reward models on labels of a gold reward (`label`), optimize them by best of n and PPO, say where to stop.

    The run directory holds `overopt.json`, plots, and a run directory per proxy and seed. The same command resumes.
    """
    from rlhf_cli.console import console
    from rlhf_cli.files import WrittenFiles
    from rlhf_cli.overopt.plot import draw
    from rlhf_cli.overopt.results import table
    from rlhf_cli.overopt.study import RESULT, Study
    from rlhf_cli.progress import say
    from rlhf_cli.recipe.loader import load_recipe

    loaded = load_recipe(recipe, settings or [])
    folder: Path = run_dir or loaded.recipe.default_run_dir
    results = Study(loaded, folder).run()
    written = WrittenFiles(folder / "overopt-plots.json")
    if pictures := draw(results, folder):
        for removed in written.replace([picture.name for picture in pictures]):
            say(f"removed {folder / removed}: of the results before, and not of these")
    for picture in pictures:
        say(f"plot in {picture}")
    console.print(table(results), soft_wrap=False)
    if as_json:
        typer.echo((folder / RESULT).read_text(encoding="utf-8"), nl=False)
    else:
        typer.echo(folder / RESULT)
