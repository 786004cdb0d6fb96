"""`rlhf run`: all stages of a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from rlhf_cli.cli.options import (
    AccelerateConfig,
    Attention,
    DryRun,
    Json,
    MaxSkip,
    Processes,
    Prompts,
    RecipeFile,
    RunDir,
    Seed,
    Settings,
)
from rlhf_cli.cli.running import Request, carry_out, shared_flags


def run(
    recipe: RecipeFile,
    settings: Settings = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Base model (`model.path`).")] = None,
    data: Annotated[str | None, typer.Option(metavar="DATA", help="Demonstrations (`sft.data`).")] = None,
    prompts: Prompts = None,
    run_dir: RunDir = None,
    first: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Take earlier stages as they are.")
    ] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="STAGE", help="Stop after this stage.")] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE", help="Run it again, done or not; repeatable.", show_default=False),
    ] = None,
    seed: Seed = None,
    attention: Attention = None,
    max_skip: MaxSkip = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    processes: Processes = None,
    accelerate_config: AccelerateConfig = None,
) -> None:
    """Run the stages a recipe names, resuming where it stopped; what is done and unchanged is left alone."""
    flags = {
        "model.path": (model, f"--model {model}"),
        "sft.data": (data, f"--data {data}"),
        "data.prompts": (prompts, f"--prompts {prompts}"),
        **shared_flags(seed, attention, max_skip),
    }
    carry_out(
        Request(
            recipe,
            settings or [],
            flags,
            run_dir,
            first=first,
            last=last,
            force=tuple(force or ()),
            dry_run=dry_run,
            as_json=as_json,
            processes=processes,
            accelerate_config=accelerate_config,
        )
    )
