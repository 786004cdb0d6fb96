"""The commands that run stages: their options, and the run they start."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rlhf_cli.cli import options
from rlhf_cli.quoting import word
from rlhf_cli.stages import registry
from rlhf_cli.stages.base import Flag, section_of

if TYPE_CHECKING:
    from rlhf_cli.recipe.loader import LoadedRecipe
    from rlhf_cli.recipe.overrides import Override


def stage_command(name: str) -> Callable[..., None]:
    """Return the command of a stage, built from the stage's declaration."""

    def command(**given: Any) -> None:
        run_stage(name, given)

    command.__doc__ = registry.REGISTRY[name][1]
    return options.with_parameters(command, stage_parameters(name))


def stage_parameters(name: str, own: Sequence[inspect.Parameter] = ()) -> list[inspect.Parameter]:
    """Return the options of a stage's command: its flags, `own`, and those of every stage."""
    return [
        options.parameter("recipe", options.OptionalRecipe),
        options.parameter("settings", options.Settings),
        *options.parameters_of(registry.stage(name).flags),
        *own,
        *run_parameters(options.parameter("force", options.Redo, default=False)),
    ]


def run_parameters(force: inspect.Parameter) -> list[inspect.Parameter]:
    """Return the options of every command that runs stages."""
    return [
        options.parameter("run_dir", options.RunDir),
        *options.parameters_of(options.RUN_FLAGS),
        force,
        options.parameter("dry_run", options.DryRun, default=False),
        options.parameter("as_json", options.Json, default=False),
        options.parameter("processes", options.Processes),
        options.parameter("accelerate_config", options.AccelerateConfig),
    ]


def run_stage(name: str, given: Mapping[str, Any], overrides: Sequence[Override] = ()) -> None:
    """Run one stage unless it is up to date; its inputs come from the run directory.

    Args:
        name: name of the stage.
        given: values of the command's options.
        overrides: settings from options that are not flags.
    """
    force = (name,) if given["force"] else ()
    flags = registry.stage(name).flags
    run_stages({**given, "force": force}, flags, overrides, section=section_of(name), first=name, last=name)


def run_stages(
    given: Mapping[str, Any],
    flags: Sequence[Flag],
    overrides: Sequence[Override] = (),
    *,
    section: str | None = None,
    first: str | None = None,
    last: str | None = None,
) -> None:
    """Run stages and print the path of the last artifact, or JSON.

    Args:
        given: values of the command's options: those of `run_parameters`, `recipe`, `settings` and the flags.
        flags: flags of the command.
        overrides: settings from options that are not flags.
        section: section to create if the recipe has none: that of a single-stage command.
        first: first stage (`--from`); None is the first of the recipe.
        last: last stage (`--to`); None is the last of the recipe.
    """
    from rlhf_cli.cli.run_summary import show_outcome, show_plan
    from rlhf_cli.distributed import launcher
    from rlhf_cli.distributed.ranks import is_main
    from rlhf_cli.pipeline import runner
    from rlhf_cli.pipeline.selection import Selection
    from rlhf_cli.run_log import LOG, stay_open

    launcher.check_options(given["processes"], given["accelerate_config"])
    _check_source(given)
    loaded = _loaded(given, flags, overrides, section=section, first=first)
    folder: Path = given["run_dir"] or loaded.recipe.default_run_dir
    if not given["dry_run"]:
        _launch(given["processes"], given["accelerate_config"], threads=loaded.recipe.model.threads, log=folder / LOG)
    selection = Selection(
        first,
        last,
        frozenset(given["force"] or ()),
        names_stages=section is None,
        keeps_finished=given["run_dir"] is None and not loaded.recipe.is_named,
    )
    if given["dry_run"]:
        result = runner.dry_run(loaded, folder, selection)
        show_plan(result, loaded.recipe.remote)
    else:
        stay_open()
        result = runner.run(loaded, folder, selection)
        if not is_main():  # rank 0 reports for all ranks
            return
        show_outcome(result)
        if section is None:
            _report(folder, [row.name for row in result.stages])
            if loaded.recipe.remote is not None:
                _copy_report(folder)
    if given["as_json"]:
        typer.echo(json.dumps(result.as_json(), indent=2, ensure_ascii=False, allow_nan=False))
    elif not given["dry_run"]:
        typer.echo(result.stages[-1].path)


def loaded_for(name: str, given: Mapping[str, Any], overrides: Sequence[Override] = ()) -> LoadedRecipe:
    """Return the recipe with which `run_stage` runs a stage."""
    return _loaded(given, registry.stage(name).flags, overrides, section=section_of(name), first=name)


def _loaded(
    given: Mapping[str, Any],
    flags: Sequence[Flag],
    overrides: Sequence[Override],
    *,
    section: str | None,
    first: str | None,
) -> LoadedRecipe:
    from rlhf_cli.console import working

    with working("reading the recipe ..."):
        return _read(given, flags, overrides, section=section, first=first)


def _read(
    given: Mapping[str, Any],
    flags: Sequence[Flag],
    overrides: Sequence[Override],
    *,
    section: str | None,
    first: str | None,
) -> LoadedRecipe:
    from rlhf_cli.errors import RecipeError
    from rlhf_cli.recipe.loader import load_recipe

    all_overrides = [*_overrides((*flags, *options.RUN_FLAGS), given), *overrides]
    try:
        return load_recipe(given["recipe"], given["settings"] or [], all_overrides, section=section)
    except RecipeError as error:
        if given["recipe"] is None and error.hint is None:
            error.hint = f"`rlhf {first} --help` lists the options; a recipe can provide all settings"
        raise


def _check_source(given: Mapping[str, Any]) -> None:
    """Refuse a recipe that is not a file where several processes would each read it."""
    from rlhf_cli.distributed.ranks import world_size
    from rlhf_cli.errors import UsageError
    from rlhf_cli.recipe.document import RecipeText

    source = given["recipe"]
    is_several = world_size() > 1 or (given["processes"] or 1) > 1 or given["accelerate_config"] is not None
    if isinstance(source, RecipeText) and is_several:
        raise UsageError(
            f"several processes cannot read their recipe from {source.name}", hint="save the recipe to a file"
        )


def _report(folder: Path, stages: Sequence[str]) -> None:
    """Write the report of a run that was evaluated, and say what comes next."""
    if "evaluate" not in stages:
        return
    from rlhf_cli.errors import RLHFError
    from rlhf_cli.progress import say, warn
    from rlhf_cli.report.build import REPORT, write_charts, write_report

    try:
        found = write_report([folder], folder / REPORT)
        write_charts(found)
    except RLHFError as error:  # the run itself is done
        warn(f"no report: {error.message}")
        return
    say(f"{found.page.verdict.headline}: {found.page.verdict.reason}")
    say(f"report: {found.html}")
    say(f"talk to it: rlhf chat {word(folder)}")


def _copy_report(folder: Path) -> None:
    """Add the report and the end of the log to the remote copy."""
    from rlhf_cli.pipeline.remote.attach import known_remote_copy

    with known_remote_copy(folder):
        pass


def _overrides(flags: Sequence[Flag], given: Mapping[str, Any]) -> list[Override]:
    """Return settings from the given flags; flags that fill the same list are concatenated."""
    from rlhf_cli.recipe.overrides import override

    values: dict[str, Any] = {}
    typed: dict[str, list[str]] = {}
    for flag in flags:
        value = given.get(flag.name)
        if value is None:
            continue
        typed.setdefault(flag.setting, []).extend(
            f"{flag.option} {one}" for one in (value if flag.repeatable else [value])
        )
        if flag.repeatable:
            entries = value if flag.entry is None else [{flag.entry: one} for one in value]
            values[flag.setting] = [*values.get(flag.setting, []), *entries]
        else:
            values[flag.setting] = value
    return [override(setting, value, " ".join(typed[setting])) for setting, value in values.items()]


def _launch(processes: int | None, accelerate_config: Path | None, *, threads: int | None, log: Path) -> None:
    """Run the command in several processes if requested; otherwise return, to run it in this process."""
    from rlhf_cli.distributed import launcher

    if accelerate_config is not None:
        launcher.exec_accelerate(accelerate_config)
    if processes is not None and processes > 1:
        launcher.start(processes, threads=threads, log=log)
        raise typer.Exit
