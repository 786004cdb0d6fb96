"""`rlhf sft`: one stage."""

from __future__ import annotations

from typing import Annotated

import typer

from rlhf_cli.cli.options import (
    AccelerateConfig,
    Attention,
    DryRun,
    Json,
    MaxSkip,
    OptionalRecipe,
    Processes,
    Redo,
    RunDir,
    Seed,
    Settings,
)
from rlhf_cli.cli.running import one_stage


def sft(
    recipe: OptionalRecipe = None,
    settings: Settings = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Base model: a folder or hub id (`model.path`).")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="DATA", help="Demonstration records (`sft.data`).")] = None,
    run_dir: RunDir = None,
    seed: Seed = None,
    attention: Attention = None,
    max_skip: MaxSkip = None,
    force: Redo = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    processes: Processes = None,
    accelerate_config: AccelerateConfig = None,
) -> None:
    """Fine-tune the base model on demonstrations."""
    flags = {
        "model.path": (model, f"--model {model}"),
        "sft.data": (data, f"--data {data}"),
    }
    one_stage(
        "sft",
        recipe,
        settings,
        flags,
        run_dir=run_dir,
        seed=seed,
        attention=attention,
        max_skip=max_skip,
        force=force,
        dry_run=dry_run,
        as_json=as_json,
        processes=processes,
        accelerate_config=accelerate_config,
    )
