"""The commands: one line per command. A command's module is imported when the command is used."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rlhf_cli.stages.registry import REGISTRY

_STAGES = {
    name: ("rlhf_cli.cli.stage_command:stage_command", help_text)
    for name, (_, help_text) in REGISTRY.items()
    if name != "label"
}
COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("rlhf_cli.cli.init:init", "Write starter recipes and sample data into a folder."),
    "run": ("rlhf_cli.cli.run:run", "Run the stages of a recipe and resume where it stopped."),
    **{name: _STAGES.get(name, ("rlhf_cli.cli.label.commands:app", REGISTRY[name][1])) for name in REGISTRY},
    "recipe": ("rlhf_cli.cli.recipe:app", "Show, check and document recipes."),
    "transformer": ("rlhf_cli.cli.transformer:app", "Convert models to the explicit transformer, and back."),
    "attention": ("rlhf_cli.cli.attention.commands:app", "Compare, verify and view attention."),
    "doctor": ("rlhf_cli.cli.doctor:doctor", "Say what this machine offers."),
}
"""Command -> where it is (`module:function`, or `module:app` for a group), and its line in `rlhf --help`."""

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _LazyCommands(TyperGroup):
    """Imports the module of the command that is called, and no other."""

    def list_commands(self, ctx: Any) -> list[str]:
        """See click."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """See click."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        found = getattr(importlib.import_module(module), attribute)
        if isinstance(found, typer.Typer):
            command = typer.main.get_group(found)
        else:
            function = found(cmd_name) if attribute == "stage_command" else found
            one = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=_CONTEXT)
            one.command(cmd_name)(function)
            command = typer.main.get_command(one)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """See click; the lines come from the table, so that `--help` imports no command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in COMMANDS.items()])


app = typer.Typer(
    cls=_LazyCommands,
    add_completion=False,
    rich_markup_mode=None,  # plain help: quicker, and readable when piped
    pretty_exceptions_enable=False,
    context_settings=_CONTEXT,
)


def _version(asked: bool) -> None:
    if asked:
        from rlhf_cli import __version__

        typer.echo(f"rlhf {__version__}")
        raise typer.Exit


@app.callback()
def rlhf(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Align a language model from one recipe: SFT, labels, reward model, PPO, evaluation.

    Start with `rlhf init my-run`, then `rlhf run my-run/recipes/quickstart.yaml`.

    stdout carries data only; everything for people goes to stderr. Exit codes: 0 done, 2 usage or recipe,
    65 bad data, 70 diverged, 74 disk, 75 run directory in use, 76 waits for people's labels, 77 a judge's cost limit,
    130 or 143 interrupted and resumable.
    """
