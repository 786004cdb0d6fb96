"""`rlhf evaluate`: one stage."""

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


def evaluate(
    recipe: OptionalRecipe = None,
    settings: Settings = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Model to compare with; default: what `sft` wrote (`evaluate.baseline`)."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Model under evaluation; default: what `ppo` wrote (`evaluate.policy`)."),
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Reward model to report (`evaluate.reward_model`).")
    ] = None,
    function: Annotated[
        str | None, typer.Option(metavar="FUNCTION", help="Judge, as `file.py:function` (`evaluate.judge_function`).")
    ] = None,
    prompts: Prompts = None,
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
    """Compare the PPO policy with the SFT model on held-out prompts."""
    flags = {
        "evaluate.baseline": (baseline, f"--baseline {baseline}"),
        "evaluate.policy": (policy, f"--policy {policy}"),
        "evaluate.reward_model": (reward_model, f"--reward-model {reward_model}"),
        "evaluate.judge_function": (function, f"--function {function}"),
        "evaluate.prompts": (prompts, f"--prompts {prompts}"),
    }
    one_stage(
        "evaluate",
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
