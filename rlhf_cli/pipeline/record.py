"""What a run directory says of how it was made.

recipe.yaml         all values of the last `rlhf run`, each with its origin
recipe.read.yaml    the recipe as it was read from stdin or an address, if it is not a file
recipes/STAGE.yaml  the same of the command that ran a stage last, which may have been `rlhf STAGE`
command.txt         all commands
environment.json    versions, machine and the commit of the recipe's repository, of the last command
log.txt             all messages (`rlhf_cli.run_log`)
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_cli.distributed.launcher import TYPED
from rlhf_cli.distributed.ranks import world_size
from rlhf_cli.files import append, write_whole
from rlhf_cli.pipeline.manifest import now, versions
from rlhf_cli.pipeline.paths import with_absolute_paths
from rlhf_cli.recipe.loader import LoadedRecipe
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.recipe.show import as_yaml

RECIPE, COMMAND, ENVIRONMENT = "recipe.yaml", "command.txt", "environment.json"
_READ = "recipe.read.yaml"
_OF_STAGES = "recipes"

_GIT_SECONDS = 5


class Record:
    """Writes how a run is made to its directory.

    A recipe holds every value with its origin, and absolute paths, so that it runs from anywhere. Commands are
    appended: a run directory may be the work of several.

    Args:
        folder: run directory.
        loaded: the recipe with the origins of its values.
        recipe: the same with resolved paths.
        is_whole: the command is `rlhf run`, not that of one stage.
    """

    def __init__(self, folder: Path, loaded: LoadedRecipe, recipe: Recipe, *, is_whole: bool) -> None:
        self._folder, self._path, self._is_whole = folder, loaded.path, is_whole
        self._read = loaded.text
        self._text = as_yaml(replace(loaded, recipe=with_absolute_paths(recipe)), folder)

    def begin(self) -> None:
        """Record the command, before its first stage."""
        if self._is_whole:
            write_whole(self._folder / RECIPE, self._text)
        if self._read is not None:
            write_whole(self._folder / _READ, self._read.text)
        append(self._folder / COMMAND, f"{now()}  cd {shlex.quote(str(Path.cwd()))} && {command_line()}\n".encode())
        write_whole(self._folder / ENVIRONMENT, json.dumps(_environment(self._path), indent=2) + "\n")

    def begin_stage(self, stage: str) -> None:
        """Record the recipe of a stage that is about to run."""
        path = recipe_of(self._folder, stage)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, self._text)


def recipe_of(folder: Path, stage: str) -> Path:
    """Return the file with the recipe that a stage of a run was run with last."""
    return folder / _OF_STAGES / f"{stage}.yaml"


def last_command(folder: Path) -> str | None:
    """Return the last command that ran in a run directory, as to be typed here to continue; None if none is recorded.

    Without `--force`, which would discard the unfinished work.
    """
    try:
        lines = (folder / COMMAND).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    typed = re.sub(r" --force(?= |$)", "", lines[-1].partition("  ")[2]) if lines else ""
    return typed.removeprefix(f"cd {shlex.quote(str(Path.cwd()))} && ") or None


def command_line() -> str:
    """Return the command that a user typed, as a shell reads it; `launcher` starts others without its own options."""
    name = Path(sys.argv[0]).name
    name = "rlhf" if name == "__main__.py" else shlex.quote(name)  # `python -m rlhf_cli` is the same
    given = os.environ[TYPED] if TYPED in os.environ and world_size() > 1 else shlex.join(sys.argv[1:])
    return f"{name} {given}".rstrip()


def _environment(recipe: Path | None) -> dict[str, Any]:
    """Return versions, the machine, and the commit of the recipe's repository, if it is in one."""
    found: dict[str, Any] = {"time": now(), "versions": versions()}
    found |= {"platform": f"{platform.system()} {platform.release()}", "machine": platform.machine()}
    if recipe is not None and (commit := _git(recipe.parent, "rev-parse", "HEAD")):
        changes = _git(recipe.parent, "status", "--porcelain", "--", recipe.name)
        found["recipe"] = {"file": str(recipe), "commit": commit, "is_changed": bool(changes)}
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what a git command prints; None without git, or outside of a repository."""
    is_inside = any((parent / ".git").exists() for parent in (folder.absolute(), *folder.absolute().parents))
    if not is_inside or (git := shutil.which("git")) is None:
        return None
    try:
        found = subprocess.run(  # noqa: S603  (our own arguments)
            [git, "-C", str(folder), *arguments], capture_output=True, text=True, timeout=_GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
