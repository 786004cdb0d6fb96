"""What `run` and the single-stage commands have in common: load, run, print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer


@dataclass(frozen=True)
class Request:
    """What a command line asks for.

    Attributes:
        recipe: the recipe file, if any.
        settings: `--set` texts.
        flags: dotted setting -> (value, flag as typed); None values were not given.
        run_dir: `--run-dir`.
        section: a section that exists even where the recipe has none: that of a single-stage command.
        first: `--from`.
        last: `--to`.
        force: stages to run again.
        dry_run: only say what would happen.
        as_json: print JSON.
        processes: `--processes`.
        accelerate_config: `--accelerate-config`.
    """

    recipe: Path | None
    settings: list[str]
    flags: Mapping[str, tuple[Any, str]]
    run_dir: Path | None
    section: str | None = None
    first: str | None = None
    last: str | None = None
    force: tuple[str, ...] = ()
    dry_run: bool = False
    as_json: bool = False
    processes: int | None = None
    accelerate_config: Path | None = None


def carry_out(request: Request) -> None:
    """Run the stages and print the artifact's path, or JSON."""
    from rlhf_cli.cli.run_summary import show_outcome, show_plan
    from rlhf_cli.distributed import launcher as launch
    from rlhf_cli.distributed.ranks import is_main
    from rlhf_cli.errors import RecipeError
    from rlhf_cli.pipeline import runner
    from rlhf_cli.pipeline.planner import Selection
    from rlhf_cli.recipe.derived import default_run_dir
    from rlhf_cli.recipe.loader import load_recipe
    from rlhf_cli.recipe.overrides import flag

    launch.check_surroundings(request.processes, request.accelerate_config)
    overrides = [flag(name, value, origin) for name, (value, origin) in request.flags.items() if value is not None]
    try:
        loaded = load_recipe(request.recipe, request.settings, overrides, section=request.section)
    except RecipeError as error:
        if request.recipe is None and error.hint is None:
            error.hint = f"`rlhf {request.first} --help` names the flags; a recipe can say it all"
        raise
    if not request.dry_run:
        _launch(request, loaded.recipe.model.threads)
    folder = request.run_dir or default_run_dir(loaded.recipe)
    selection = Selection(request.first, request.last, frozenset(request.force))
    if request.dry_run:
        result = runner.dry_run(loaded, folder, selection)
        show_plan(result)
    else:
        result = runner.run(loaded, folder, selection)
        if not is_main():  # what was done is rank 0's to tell
            return
        show_outcome(result)
    if request.as_json:
        typer.echo(json.dumps(result.as_json(), indent=2, ensure_ascii=False, allow_nan=False))
    elif not request.dry_run:
        typer.echo(result.stages[-1].path)


def _launch(request: Request, threads: int | None) -> None:
    """Where several processes are asked for, do all in those; returns where this process is to do it alone."""
    from rlhf_cli.distributed import launcher as launch

    if request.accelerate_config is not None:
        launch.hand_over(request.accelerate_config)
    if request.processes is not None and request.processes > 1:
        launch.start(request.processes, threads=threads)
        raise typer.Exit


def one_stage(
    stage: str,
    recipe: Path | None,
    settings: list[str] | None,
    flags: Mapping[str, tuple[Any, str]],
    *,
    run_dir: Path | None,
    seed: int | None,
    attention: str | None,
    max_skip: float | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    processes: int | None,
    accelerate_config: Path | None,
) -> None:
    """Bring one stage up to date; what it reads is taken as it is in the run directory."""
    carry_out(
        Request(
            recipe,
            settings or [],
            {**flags, **shared_flags(seed, attention, max_skip)},
            run_dir,
            section=stage.replace("-", "_"),
            first=stage,
            last=stage,
            force=(stage,) if force else (),
            dry_run=dry_run,
            as_json=as_json,
            processes=processes,
            accelerate_config=accelerate_config,
        )
    )


def shared_flags(seed: int | None, attention: str | None, max_skip: float | None) -> dict[str, tuple[Any, str]]:
    """Flags every stage has."""
    return {
        "seed": (seed, f"--seed {seed}"),
        "model.attention": (attention, f"--attention {attention}"),
        "data.max_skip": (max_skip, f"--max-skip {max_skip}"),
    }
