"""`rlhf start`: a few questions, then a recipe that runs as it is. `rlhf init` writes it from options."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_cli.cli import options
from rlhf_cli.quoting import word

if TYPE_CHECKING:
    from rlhf_cli.start.questions import Given

_RECIPE = Annotated[Path, typer.Argument(metavar="[RECIPE]", help="Recipe to write, a .yaml file.")]
_DEFAULT = Path("mine.yaml")
_TEXTS = (
    ("model", "MODEL", "Model: a folder or hub id."),
    ("prompts", "DATA", "Prompts: a file, folder or hub data set."),
    ("labels", "DATA", "Preferences or rankings to learn from, in place of your own."),
    ("reward", "REWARD", "What scores completions: FILE.py:FUNCTION, a reward model or a URL."),
    ("demonstrations", "DATA", "Demonstrations for supervised fine-tuning before the rest."),
)
_JUDGE = Annotated[
    list[str] | None,
    typer.Option(metavar="MODEL", help="Judge: a folder, hub id or NAME@URL; repeatable.", show_default=False),
]
_STEPS = Annotated[int | None, typer.Option(metavar="N", min=1, help="PPO steps; 10 for a first look.")]
_FORCE = Annotated[bool, typer.Option("--force", help="Replace an existing recipe.")]

CHOICES = (
    *(
        options.parameter(name, Annotated[str | None, typer.Option(metavar=metavar, help=text)])
        for name, metavar, text in _TEXTS
    ),
    options.parameter("judge", _JUDGE),
    options.parameter("steps", _STEPS),
    options.parameter("settings", options.Settings),
    options.parameter("force", _FORCE, default=False),
)
"""The options of `start` and `init` that say what the recipe holds."""


def start(**given: Any) -> None:
    """Answer at most four questions and get a recipe that fits your model and data.

    Each answer is checked at once: the model's files and chat template, the records of a file and their tokens. Options
    answer questions beforehand. For scripts, `rlhf init` takes the same options and asks nothing.
    """
    from rlhf_cli.errors import UsageError
    from rlhf_cli.progress import say
    from rlhf_cli.start.questions import line_reader

    path: Path = given["recipe"]
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError(
            "`rlhf start` asks questions, which needs a terminal",
            hint=f"give the answers as options: rlhf init {word(path)} --model MODEL --prompts FILE --steps 10; and "
            "--labels FILE, --judge MODEL or --reward FILE.py:FUNCTION if you do not rank completions yourself",
        )
    say("A few questions, then a recipe. Tab completes file names; Ctrl-C quits without writing anything.")
    try:
        read = line_reader()
        write(given, path if given["force"] else _free_name(path, read), read)
    except (EOFError, KeyboardInterrupt):
        say("\nquit; no recipe was written")
        raise typer.Exit(1) from None


def write(given: Mapping[str, Any], path: Path, read: Any = None) -> None:
    """Find out what a recipe needs and write it; without a person, print its path for a script.

    Args:
        given: values of the options.
        path: of the recipe.
        read: reads a line from a person; None asks nobody.
    """
    from rlhf_cli.start.duration import say_how_long
    from rlhf_cli.start.measuring import with_lengths
    from rlhf_cli.start.questions import Questions
    from rlhf_cli.start.writing import check_target, write_recipe

    check_target(path, force=given["force"])
    draft = Questions(_choices(given), read).draft()
    if read is None:
        write_recipe(draft, path, _command())
        typer.echo(path)
    else:
        draft = with_lengths(draft)
        write_recipe(draft, path, "rlhf start")
        say_how_long(draft, path)


def _choices(given: Mapping[str, Any]) -> Given:
    from rlhf_cli.start.questions import Given

    texts = {name: given[name] for name, _, _ in _TEXTS}
    return Given(**texts, judges=given["judge"] or (), steps=given["steps"], settings=given["settings"] or ())


def _command() -> str:
    return shlex.join(["rlhf", *sys.argv[1:]])


def _free_name(path: Path, read: Any) -> Path:
    """Return a name that no file has: this one, or another that the person gives."""
    from rlhf_cli.progress import say

    while path.exists():
        say(
            f"{path} exists. Type another name for the new recipe, or press Ctrl-C and replace it with `rlhf start "
            f"{word(path)} --force`."
        )
        name = read("> ").strip()
        path = Path(name) if name else path
    return path


options.with_parameters(start, [options.parameter("recipe", _RECIPE, default=_DEFAULT), *CHOICES])
