"""Sampling in the background, while an interface for annotators is open."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.cli.stage_command import loaded_for

if TYPE_CHECKING:
    from rlhf_cli.distributed.background import BackgroundCommand
    from rlhf_cli.recipe.overrides import Override


def background_sampling(given: Mapping[str, Any], overrides: Sequence[Override]) -> BackgroundCommand | None:
    """Return this command as a process that samples for an interface of this one; None where that does not work.

    Args:
        given: values of the options of `rlhf label`.
        overrides: settings from options that are not flags.
    """
    from rlhf_cli.distributed.launcher import worker_command
    from rlhf_cli.distributed.ranks import world_size
    from rlhf_cli.recipe.document import RecipeText
    from rlhf_cli.run_log import LOG

    is_several = world_size() > 1 or (given["processes"] or 1) > 1 or given["accelerate_config"] is not None
    # Several processes open no interface, a recipe from stdin can be read once, and Windows has no process groups.
    if is_several or given["dry_run"] or isinstance(given["recipe"], RecipeText) or sys.platform == "win32":
        return None
    recipe = loaded_for("label", given, overrides).recipe
    if recipe.label is None or not recipe.label.samples_for_people:
        return None
    from rlhf_cli.distributed.background import BackgroundCommand

    return BackgroundCommand(worker_command(sys.argv[1:]), (given["run_dir"] or recipe.default_run_dir) / LOG)


@dataclass(frozen=True)
class OtherCommand:
    """The command that uses a run directory, if one does; it may be sampling."""

    run_dir: Path

    @property
    def is_running(self) -> bool:
        """Whether a command uses the run directory."""
        from rlhf_cli.pipeline.run_directory import RunDirectory

        return RunDirectory(self.run_dir).is_in_use
