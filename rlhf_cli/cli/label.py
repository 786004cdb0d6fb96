"""`rlhf label`: one stage."""

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
    Prompts,
    Redo,
    RunDir,
    Seed,
    Settings,
)
from rlhf_cli.cli.running import one_stage


def label(
    recipe: OptionalRecipe = None,
    settings: Settings = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Policy to sample from; default: what `sft` wrote (`label.model`)."),
    ] = None,
    prompts: Prompts = None,
    by: Annotated[
        str | None, typer.Option(metavar="WHO", help="function, reward-model or import; follows from the flags below.")
    ] = None,
    function: Annotated[
        str | None, typer.Option(metavar="FUNCTION", help="Labeller, as `file.py:function` (`label.function`).")
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Labeller, a reward model (`label.reward_model`).")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Rankings or preferences to bring in (`label.data`).")
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
    """Sample answers and rank them, or bring in rankings that people made."""
    given = [("function", function), ("reward-model", reward_model), ("import", data)]
    implied = next(
        ((who, f"--{who if who != 'import' else 'data'}") for who, value in given if value is not None), None
    )
    flags = {
        "label.by": (by, f"--by {by}") if by is not None or implied is None else implied,
        "label.model": (model, f"--model {model}"),
        "label.prompts": (prompts, f"--prompts {prompts}"),
        "label.function": (function, f"--function {function}"),
        "label.reward_model": (reward_model, f"--reward-model {reward_model}"),
        "label.data": (data, f"--data {data}"),
    }
    one_stage(
        "label",
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
