"""`rlhf label`: one stage, the two faces that people label in, and what can be done with labels."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from rlhf_cli.cli.label import export as label_export
from rlhf_cli.cli.label import import_labels as label_import
from rlhf_cli.cli.label import stats as label_stats
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
from rlhf_cli.errors import UsageError

_STAGE = "stage"
"""Inner name of the command that `rlhf label` is without a word behind it."""


class _OneStageOrMore(TyperGroup):
    """`rlhf label stats ...` is a command of its own; anything else behind `rlhf label` belongs to the stage."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """See click; the stage's name is never typed."""
        if not args or args[0] not in self.commands or args[0] == _STAGE:
            args = [_STAGE, *args]
        return super().parse_args(ctx, args)


class _Stage(TyperCommand):
    """The stage, which is called as its group is, in usage lines too."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """See click."""
        return super().make_context(parent.info_name, args, parent=parent.parent, **extra)


app = typer.Typer(cls=_OneStageOrMore, rich_markup_mode=None, help="Rank answers: sample, label, count, export.")


@app.command(
    _STAGE,
    cls=_Stage,
    epilog="What can be done with labels: rlhf label stats | export | import, each with --help of its own.",
)
def label(
    recipe: OptionalRecipe = None,
    settings: Settings = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Policy to sample from; default: what `sft` wrote (`label.model`)."),
    ] = None,
    prompts: Prompts = None,
    items: Annotated[
        str | None, typer.Option(metavar="DATA", help="Answers to rank, in place of sampled ones (`label.items`).")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="WHO", help="human, judge, function, reward-model or import; follows from the flags below."
        ),
    ] = None,
    function: Annotated[
        str | None, typer.Option(metavar="FUNCTION", help="Labeler, as `file.py:function` (`label.function`).")
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Labeler, a reward model (`label.reward_model`).")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Rankings or preferences to bring in (`label.data`).")
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Judge: a model folder or hub id, or NAME@URL of an OpenAI-compatible endpoint; repeatable.",
            show_default=False,
        ),
    ] = None,
    calibrate: Annotated[
        str | None, typer.Option(metavar="DATA", help="Human labels to measure judges by (`label.judge.calibration`).")
    ] = None,
    floor: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Least agreement with them (`label.judge.floor`).")
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(metavar="N", help="People who label each prompt (`label.human.overlap`).")
    ] = None,
    guidelines: Annotated[
        str | None, typer.Option(metavar="FILE", help="What labelers are told (`label.human.guidelines`).")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Label in a browser: serve a page, and say its links.")
    ] = False,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where --serve listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Of --serve; 0 takes a free one.")] = 8100,
    annotator: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Who labels; repeatable with --serve. Default: you.", show_default=False),
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
    """Sample answers and rank them: by people, judges, a function or a reward model; or bring rankings in.

    People label at the keyboard, or in a browser with --serve. A run directory that waits for people needs no recipe:
    `rlhf label --run-dir runs/mine`. Exit code 76 says that labels are still needed.
    """
    from rlhf_cli.cli.label.people import Face, label_by_people

    people = by == "human" or serve or overlap is not None or guidelines is not None
    given = [
        ("function", "--function", function),
        ("reward-model", "--reward-model", reward_model),
        ("import", "--data", data),
        ("judge", "--judge", judge),
        ("human", "--serve" if serve else "--overlap" if overlap is not None else "--guidelines", people or None),
    ]
    implied = next(((who, flag) for who, flag, value in given if value is not None), None) if recipe is None else None
    flags: dict[str, tuple[Any, str]] = {
        "label.by": (by, f"--by {by}") if by is not None or implied is None else implied,
        "label.model": (model, f"--model {model}"),
        "label.prompts": (prompts, f"--prompts {prompts}"),
        "label.items": (items, f"--items {items}"),
        "label.function": (function, f"--function {function}"),
        "label.reward_model": (reward_model, f"--reward-model {reward_model}"),
        "label.data": (data, f"--data {data}"),
        "label.judge.panel": (_panel(judge), f"--judge {' '.join(judge or ())}"),
        "label.judge.calibration": (calibrate, f"--calibrate {calibrate}"),
        "label.judge.floor": (floor, f"--floor {floor}"),
        "label.human.overlap": (overlap, f"--overlap {overlap}"),
        "label.human.guidelines": (guidelines, f"--guidelines {guidelines}"),
    }
    stage = {
        "run_dir": run_dir,
        "seed": seed,
        "attention": attention,
        "max_skip": max_skip,
        "dry_run": dry_run,
        "as_json": as_json,
        "processes": processes,
        "accelerate_config": accelerate_config,
    }
    joins = recipe is None and not settings and all(value is None for value, _ in flags.values() if value != "human")
    label_by_people(
        lambda force: one_stage("label", recipe, settings, flags, force=force, **stage),
        Face(serve, host, port, tuple(annotator or ())),
        waits_in=run_dir if joins and run_dir is not None and not (force or dry_run) else None,
        force=force,
    )


def _panel(judges: list[str] | None) -> list[dict[str, str]] | None:
    """Judges as the recipe has them; `NAME@http://...` is an endpoint."""
    if not judges:
        return None
    panel = []
    for judge in judges:
        name, _, url = judge.partition("@")
        is_endpoint = url.startswith(("http://", "https://"))
        if url and not is_endpoint and (":" in url or url.split("/")[0].count(".")):
            raise UsageError(f"`--judge {judge}`: the address has no http://", hint=f"write {name}@http://{url}")
        panel.append({"url": url, "name": name} if is_endpoint else {"model": judge})
    return panel


app.command("stats")(label_stats.stats)
app.command("export")(label_export.export)
app.command("import")(label_import.import_)
