"""Options of every command, which may stand before or after its name: `--quiet` and `--verbose`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rlhf_cli.cli.environment import show_libraries
from rlhf_cli.errors import UsageError
from rlhf_cli.verbosity import QUIET_VARIABLE, VERBOSE_VARIABLE, Verbosity, set_verbosity

FLAGS = ("--quiet", "-q", "--verbose", "-v")

_GIVEN = "rlhf_cli.verbosity"
"""Key of what the command line asks for, in what the contexts of a command and its group share."""


def _quiet(context: typer.Context, asked: bool) -> None:
    if asked:
        _set(context, Verbosity.QUIET)


def _verbose(context: typer.Context, asked: bool) -> None:
    if asked:
        _set(context, Verbosity.VERBOSE)
        show_libraries()


def _set(context: typer.Context, verbosity: Verbosity) -> None:
    if context.meta.setdefault(_GIVEN, verbosity) is not verbosity:
        raise UsageError("`--quiet` and `--verbose` exclude each other", hint="use one of them")
    set_verbosity(verbosity)


def _options(
    quiet: Annotated[
        bool,
        typer.Option(
            *FLAGS[:2],
            callback=_quiet,
            is_eager=True,
            expose_value=False,
            help=f"Print errors and results only.  [{QUIET_VARIABLE}=1]",
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            *FLAGS[2:],
            callback=_verbose,
            is_eager=True,
            expose_value=False,
            help=f"Print details, warnings of libraries and tracebacks.  [{VERBOSE_VARIABLE}=1]",
        ),
    ] = False,
) -> None: ...


def _show_metavar(argument: Any) -> None:
    """Show no Python type, such as `<Any>`, and no braces around an argument: its metavar has what a reader needs."""
    argument.display_type_rich = lambda ctx: None
    argument.get_usage_pieces = lambda ctx: [argument.metavar]


def add_global_options(command: Any) -> None:
    """Add the options to a command, and to all commands of a group; show their arguments by metavar alone."""
    declared = typer.Typer(add_completion=False)
    declared.command()(_options)
    for argument in command.params:
        if argument.param_type_name == "argument":
            _show_metavar(argument)
    command.params += typer.main.get_command(declared).params
    if isinstance(command, TyperGroup):
        for name in command.commands:
            add_global_options(command.commands[name])
