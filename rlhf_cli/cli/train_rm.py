"""`rlhf train-rm`: one stage."""

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


def train_rm(
    recipe: OptionalRecipe = None,
    settings: Settings = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Reward model to start from; default: what `sft` wrote (`train_rm.model`)."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Rankings or preferences; default: what `label` wrote (`train_rm.data`)."),
    ] = None,
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
    """Train a reward model on rankings or preferences."""
    flags = {
        "train_rm.model": (model, f"--model {model}"),
        "train_rm.data": (data, f"--data {data}"),
    }
    one_stage(
        "train-rm",
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
