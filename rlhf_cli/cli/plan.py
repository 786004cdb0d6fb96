"""`rlhf plan`: what a run will take, before it runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_cli.cli.options import Json, RecipeFile, RunDir, Settings

if TYPE_CHECKING:
    from rlhf_cli.pipeline.plan_target import Target

_FIRST = Annotated[str | None, typer.Option("--from", metavar="STAGE", help="First stage to plan.")]
_LAST = Annotated[str | None, typer.Option("--to", metavar="STAGE", help="Last stage to plan.")]
_NO_TRIAL = Annotated[
    bool, typer.Option("--no-trial", help="Measure nothing: no model is loaded, and no time is given.")
]
_GPU = Annotated[
    str | None,
    typer.Option("--gpu", metavar="NAME", help="Plan for another machine: a GPU such as h100, or its memory in GB."),
]
_GPUS = Annotated[int | None, typer.Option("--gpus", metavar="N", min=1, help="With --gpu: GPUs, all nodes together.")]
_NODES = Annotated[
    int | None, typer.Option("--nodes", metavar="N", min=1, help="With --gpu: machines; default: 8 GPUs in each.")
]
_INTERCONNECT = Annotated[
    float | None,
    typer.Option(
        "--interconnect", metavar="GBIT", min=0.1, help="With --gpu: Gbit/s between nodes per GPU; default: 400."
    ),
]
_SERVER_GPUS = Annotated[
    int | None,
    typer.Option("--server-gpus", metavar="N", min=1, help="With --gpu: further GPUs, of `generation.vllm_server`."),
]
_SIZE = Annotated[
    str | None,
    typer.Option(
        "--size", metavar="SIZE", help="With --gpu: 1b, 8b, 32b, 70b, or a config.json, in place of the recipe's model."
    ),
]


def plan(
    recipe: RecipeFile,
    settings: Settings = None,
    first: _FIRST = None,
    last: _LAST = None,
    run_dir: RunDir = None,
    no_trial: _NO_TRIAL = False,
    gpu: _GPU = None,
    gpus: _GPUS = None,
    nodes: _NODES = None,
    interconnect: _INTERCONNECT = None,
    server_gpus: _SERVER_GPUS = None,
    size: _SIZE = None,
    as_json: Json = False,
) -> None:
    """Estimate what each stage of a recipe will take: steps, tokens, FLOPs, memory, disk and time.

    Data is read and checked as in a run. Times come from a trial of ten to twenty seconds on this machine.
    With --gpu, memory and time are those of other machines, predicted from data sheets. Nothing is written.
    """
    from rlhf_cli.cli.plan_report import plan_json, show_plan
    from rlhf_cli.pipeline.plan import plan_run
    from rlhf_cli.pipeline.selection import Selection
    from rlhf_cli.recipe.loader import load_recipe

    loaded = load_recipe(recipe, settings or [])
    folder = run_dir or loaded.recipe.default_run_dir
    options = {"--gpus": gpus, "--nodes": nodes, "--interconnect": interconnect, "--size": size}
    target = _target(gpu, options | {"--server-gpus": server_gpus})
    found = plan_run(loaded, folder, Selection(first, last), trial=not no_trial, target=target)
    if as_json:
        typer.echo(json.dumps(plan_json(found), indent=2, ensure_ascii=False))
    else:
        show_plan(found)


def _target(gpu: str | None, others: dict[str, Any]) -> Target | None:
    """Return the machines of the options; None without `--gpu`."""
    from rlhf_cli.errors import UsageError
    from rlhf_cli.models.gpus import Cluster
    from rlhf_cli.models.model_sizes import find_size
    from rlhf_cli.pipeline.plan_target import Target

    given = {option: value for option, value in others.items() if value is not None}
    if gpu is None:
        if given:
            raise UsageError(f"`{next(iter(given))}` needs `--gpu`", hint="add a GPU, such as `--gpu h100`")
        return None
    size = given.get("--size")
    cluster = Cluster.of(gpu, given.get("--gpus", 1), given.get("--nodes"), given.get("--interconnect", 400.0))
    return Target(cluster, None if size is None else find_size(size), given.get("--server-gpus", 0))
