"""`rlhf ppo`: one stage."""

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


def ppo(
    recipe: OptionalRecipe = None,
    settings: Settings = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Policy to start from and KL reference; default: what `sft` wrote (`ppo.model`)."
        ),
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Default: what `train-rm` wrote (`ppo.reward_model`).")
    ] = None,
    function: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FUNCTION",
            help="Reward by Python code, `file.py:function`; repeatable (`ppo.rewards`).",
            show_default=False,
        ),
    ] = None,
    reward_url: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Reward by an HTTP endpoint; repeatable (`ppo.rewards`).", show_default=False),
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
    """Train the policy against a reward, on a KL leash to the SFT model."""
    rewards = [{"function": one} for one in function or ()] + [{"url": one} for one in reward_url or ()]
    typed = [f"--function {one}" for one in function or ()] + [f"--reward-url {one}" for one in reward_url or ()]
    flags = {
        "ppo.model": (model, f"--model {model}"),
        "ppo.reward_model": (reward_model, f"--reward-model {reward_model}"),
        "ppo.rewards": (rewards or None, " ".join(typed)),
        "ppo.prompts": (prompts, f"--prompts {prompts}"),
    }
    one_stage(
        "ppo",
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
