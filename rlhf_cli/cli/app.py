"""The commands, one line per command. A command's module is imported when the command is used."""

from __future__ import annotations

import importlib
import os
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from rlhf_cli.cli.global_options import add_global_options
from rlhf_cli.stages.registry import REGISTRY

_STAGES = {
    name: ("rlhf_cli.cli.stage_command:stage_command", help_text)
    for name, (_, help_text) in REGISTRY.items()
    if name != "label"
}
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("rlhf_cli.cli.quickstart:quickstart", "Run the whole pipeline on a tiny model, in minutes."),
    "start": ("rlhf_cli.cli.start:start", "Get a recipe for your model and data from a few questions."),
    "init": ("rlhf_cli.cli.init:init", "Write a recipe from options, or starter recipes to a folder."),
    "plan": ("rlhf_cli.cli.plan:plan", "Estimate what a run will take: steps, memory, disk, time."),
    "run": ("rlhf_cli.cli.run:run", "Run the stages of a recipe; resume an interrupted run."),
    **{name: _STAGES.get(name, ("rlhf_cli.cli.label.commands:app", REGISTRY[name][1])) for name in REGISTRY},
    "overopt": ("rlhf_cli.cli.overopt:overopt", "Find how far proxies of a gold reward can be optimized."),
    "watch": ("rlhf_cli.cli.watch:watch", "Follow a run live: progress, curves, health, completions."),
    "diagnose": ("rlhf_cli.cli.diagnose:diagnose", "Say what is wrong with a run, the evidence, and what to try."),
    "chat": ("rlhf_cli.cli.chat:chat", "Talk to the models of a run, side by side."),
    "report": ("rlhf_cli.cli.report:report", "Write a report of a run, or of several compared, as HTML."),
    "reproduce": ("rlhf_cli.cli.reproduce:reproduce", "Repeat a run from its recorded recipe and compare the hashes."),
    "compare": ("rlhf_cli.cli.compare:compare", "Compare evaluated runs, over prompts and over seeds."),
    "benchmark-rm": ("rlhf_cli.cli.benchmark_rm:benchmark_rm", "Score a reward model on RewardBench and similar data."),
    "push": ("rlhf_cli.cli.push:push", "Upload a model of a run to the Hugging Face hub."),
    "export": (
        "rlhf_cli.cli.export:export",
        "Write a model for transformers, llama.cpp, verl or OpenRLHF.",
    ),
    "recipe": ("rlhf_cli.cli.recipe:app", "Show and validate recipes; print their JSON schema."),
    "data": ("rlhf_cli.cli.data:app", "Show data as the stages read it, as tokens."),
    "transformer": ("rlhf_cli.cli.transformer:app", "Convert GPT-2 and Llama models to the built-in transformer."),
    "attention": ("rlhf_cli.cli.attention.commands:app", "List, benchmark, verify and visualize attention backends."),
    "completion": (
        "rlhf_cli.cli.completion:completion",
        "Print a script that lets a shell complete commands.",
    ),
    "doctor": ("rlhf_cli.cli.doctor:doctor", "Show hardware, library versions and problems."),
}
"""Command -> `module:function` (or `module:app` for a group), and its line in `rlhf --help`."""

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _LazyCommands(TyperGroup):
    """Imports only the module of the command that is called."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        add_global_options(self)
        self._completes = False
        self.commands = dict.fromkeys(COMMANDS)  # type: ignore[assignment]  (names to suggest; see `get_command`)

    def list_commands(self, ctx: Any) -> list[str]:
        """See click."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """See click."""
        if cmd_name not in COMMANDS:
            return None
        if self._completes:
            return TyperCommand(cmd_name, help=COMMANDS[cmd_name][1])
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
        add_global_options(command)
        return command

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """See click; names and help of the commands come from the table too."""
        self._completes = True
        try:
            return super().shell_complete(ctx, incomplete)
        finally:
            self._completes = False

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """See click; the lines come from the table, so that `--help` imports no command module."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in COMMANDS.items()])


app = typer.Typer(
    cls=_LazyCommands,
    add_completion=False,
    rich_markup_mode=None,  # plain help: faster, and readable when piped
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
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """RLHF from one recipe: SFT, labels, reward model, PPO, evaluation.

    \b
    To start:
      rlhf quickstart     the whole pipeline on a tiny model
      rlhf start          a recipe for your own model and data

    Results are printed on stdout, messages and progress on stderr. runs/NAME/log.txt keeps the messages of a run.

    \b
    Exit codes:
      0    done                   75   run directory in use
      2    usage or recipe error  76   waiting for human labels
      65   bad data or model      77   cost limit of a judge reached
      70   diverged or stopped    78   a requirement of the recipe is not met
      74   disk full or failing   124  stalled
                                  130, 143  interrupted; can be resumed
    """
    from rlhf_cli.distributed.ranks import check_launcher_environment

    if context.invoked_subcommand != "doctor":  # which reports it
        check_launcher_environment(os.environ)
