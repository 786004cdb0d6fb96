"""The stages that a command selects, and those that it forces."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches

from rlhf_cli.errors import UsageError
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages import registry
from rlhf_cli.stages.base import Stage


@dataclass(frozen=True)
class Selection:
    """The stages that the command line selects.

    Attributes:
        first: `--from`; None is the first stage of the recipe.
        last: `--to`; None is the last stage of the recipe.
        force: `--force`: stages that run again even if they are finished.
        names_stages: whether `--force` takes the name of a stage, as in `rlhf run`, for messages.
        keeps_finished: whether a finished artifact that other settings or inputs made is refused, not replaced:
            nobody named the run directory, so that it may hold the result of something else.
    """

    first: str | None = None
    last: str | None = None
    force: frozenset[str] = field(default_factory=frozenset)
    names_stages: bool = True
    keeps_finished: bool = False


def select(recipe: Recipe, selection: Selection) -> list[Stage]:
    """Return the selected stages in order; raises `UsageError` for names that do not fit the recipe."""
    present = [stage for stage in registry.stages() if recipe.section(stage.name) is not None]
    names = [stage.name for stage in present]
    if not present:
        sections = ", ".join(stage.section for stage in registry.stages())
        raise UsageError("the recipe has no stage to run", hint=f"add a section: {sections}")
    asked = [("--from", selection.first), ("--to", selection.last), *(("--force", f) for f in selection.force)]
    for option, name in asked:
        if name is not None:
            _check_name(option, name, names)
    begin = names.index(selection.first) if selection.first else 0
    end = names.index(selection.last) + 1 if selection.last else len(names)
    if begin >= end:
        raise UsageError(f"`--from {selection.first}` comes after `--to {selection.last}`")
    chosen = present[begin:end]
    for name in sorted(selection.force - {stage.name for stage in chosen}):
        raise UsageError(f"`--force {name}` is outside the stages selected by --from and --to")
    return chosen


def _check_name(option: str, name: str, names: list[str]) -> None:
    if name in names:
        return
    if name in registry.REGISTRY:
        raise UsageError(f"`{option} {name}`: the recipe has no such stage", hint=f"its stages are {', '.join(names)}")
    close = get_close_matches(name.lower().replace("_", "-"), registry.REGISTRY, n=1)
    meant = f", did you mean `{close[0]}`?" if close else ""
    raise UsageError(f"`{option} {name}`: no such stage{meant}", hint=f"the stages are {', '.join(registry.REGISTRY)}")
