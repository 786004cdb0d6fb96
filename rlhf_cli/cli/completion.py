"""`rlhf completion`: what a shell completes, and the script that asks for it. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer

COMPLETE = "_RLHF_COMPLETE"
"""Variable of the environment by which the script of a shell asks what can follow."""

_RECIPES = Path("recipes")
_RUNS = Path("runs")


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> None:
    """Print a script that lets a shell complete commands, options, recipes, run directories and stages.

    \b
    To load it with each new shell, add one line to its configuration:
      ~/.bashrc                    eval "$(rlhf completion bash)"
      ~/.zshrc, after compinit     eval "$(rlhf completion zsh)"
      ~/.config/fish/config.fish   rlhf completion fish | source
    """
    from typer.completion import get_completion_script  # pyright: ignore[reportPrivateImportUsage]  (typer has no other)

    typer.echo(get_completion_script(prog_name="rlhf", complete_var=COMPLETE, shell=shell))


def prepare_completion() -> None:
    """Let typer reply to the script of a shell; `typer.Typer` does so only with options that edit the user's files."""
    from typer.completion import completion_init  # pyright: ignore[reportPrivateImportUsage]

    completion_init()


def recipes(incomplete: str) -> list[str]:
    """Return the recipes and folders that a path may go on to; those of `recipes/` stand for an empty one too."""
    found = [path for path in _beside(incomplete) if path.is_dir() or path.suffix in (".yaml", ".yml")]
    if not incomplete:
        found += sorted(_RECIPES.glob("*.y*ml"))
    return _matching(found, incomplete)


def run_directories(incomplete: str) -> list[str]:
    """Return the run directories in `runs/`, and the folders that a path may go on to."""
    runs = sorted(path for path in _RUNS.glob("[!.]*") if path.is_dir())
    if any(str(path).startswith(incomplete) for path in runs):
        return [str(path) for path in runs if str(path).startswith(incomplete)]
    return _matching([path for path in _beside(incomplete) if path.is_dir()], incomplete)


def models(incomplete: str) -> list[str]:
    """Return the folders of models in the runs of `runs/`, and the folders that a path may go on to."""
    found = [str(path.parent) for path in sorted(_RUNS.glob("[!.]*/*/manifest.json")) if _has_model(path.parent)]
    matching = [path for path in found if path.startswith(incomplete)]
    return matching or run_directories(incomplete)


def _has_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "reward.json"))


def stages(incomplete: str) -> list[str]:
    """Return names of stages."""
    from rlhf_cli.stages.registry import REGISTRY

    return [name for name in REGISTRY if name.startswith(incomplete)]


def _beside(incomplete: str) -> list[Path]:
    """Return what is in the folder that an unfinished path names, without hidden files."""
    folder = Path(incomplete if incomplete.endswith("/") else incomplete.rpartition("/")[0])
    if incomplete.startswith("/") and folder == Path():
        folder = Path("/")
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def _matching(paths: Iterable[Path], incomplete: str) -> list[str]:
    names = [f"{path}/" if path.is_dir() else str(path) for path in paths]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]
