"""The commands and where each lives. Each module parses; heavy imports wait inside."""

from __future__ import annotations

from typing import Annotated

import typer
from typer.core import TyperGroup

from rlhf_cli.cli import doctor, evaluate, init, ppo, recipe, run, sft, train_rm, transformer
from rlhf_cli.cli.attention import commands as attention
from rlhf_cli.cli.label import commands as label
from rlhf_cli.stages.base import STAGES


class _InOrder(TyperGroup):
    """Lists commands in the order of the pipeline, whether they have commands of their own or not."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        """See click."""
        stages = ["init", "run", *(stage.name for stage in STAGES)]
        return [*stages, *(name for name in super().list_commands(ctx) if name not in stages)]


app = typer.Typer(
    cls=_InOrder,
    add_completion=False,
    rich_markup_mode=None,  # plain help: quicker, and readable when piped
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(asked: bool) -> None:
    if asked:
        from rlhf_cli import __version__

        typer.echo(f"rlhf {__version__}")
        raise typer.Exit


@app.callback()
def rlhf(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and end.")
    ] = False,
) -> None:
    """Align a language model from one recipe: SFT, labels, reward model, PPO, evaluation.

    Start with `rlhf init my-run`, then `rlhf run my-run/recipes/quickstart.yaml`.

    stdout carries data only; everything for people goes to stderr. Exit codes: 0 done, 2 usage or recipe,
    65 bad data, 70 diverged, 74 disk, 75 run directory in use, 76 waits for people's labels, 77 a judge's cost limit,
    130 or 143 interrupted and resumable.
    """


app.command("init")(init.init)
app.command("run")(run.run)
app.command("sft")(sft.sft)
app.add_typer(label.app, name="label")
app.command("train-rm")(train_rm.train_rm)
app.command("ppo")(ppo.ppo)
app.command("evaluate")(evaluate.evaluate)
app.add_typer(recipe.app, name="recipe")
app.add_typer(transformer.app, name="transformer")
app.add_typer(attention.app, name="attention")
app.command("doctor")(doctor.doctor)
