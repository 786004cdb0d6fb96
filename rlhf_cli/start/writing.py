"""Writes the recipe of `rlhf start` and `rlhf init`, checks it as a run does, and says what comes next."""

from __future__ import annotations

from pathlib import Path

from rlhf_cli.errors import DiskError, UsageError
from rlhf_cli.files import write_whole
from rlhf_cli.pipeline import runner
from rlhf_cli.pipeline.selection import Selection
from rlhf_cli.progress import say
from rlhf_cli.quoting import word
from rlhf_cli.recipe.editor_schema import FILE_NAME, schema_line, write_schema
from rlhf_cli.recipe.loader import load_recipe
from rlhf_cli.start.draft import Draft, recipe_text

SUFFIXES = (".yaml", ".yml")


def check_target(path: Path, *, force: bool) -> None:
    """Check the name of a recipe before anything is asked.

    Raises:
        UsageError: it is not that of a YAML file, or the file exists and may not be replaced.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: a recipe is a .yaml file", hint=f"name it {path.with_suffix('.yaml')}")
    if path.is_dir() or (path.exists() and not force):
        raise UsageError(f"{path} exists", hint="name another file, or replace it with `--force`")


def write_recipe(draft: Draft, path: Path, command: str) -> str:
    """Write a recipe, check it with all that it names, and return its text without the line for editors.

    Raises:
        RLHFError: what is wrong with the recipe, its data or its models; the file is there, to be edited.
        DiskError: the file cannot be written.
    """
    text = recipe_text(draft, path, command)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        has_schema = write_schema(path.parent)
        write_whole(path, (schema_line() if has_schema else "") + text)
    except OSError as error:
        raise DiskError(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from error
    beside = f" and {path.with_name(FILE_NAME)}, with which editors check it" if has_schema else ""
    say(f"wrote {path}{beside}:\n\n{text}")
    loaded = load_recipe(path)
    runner.dry_run(loaded, loaded.recipe.default_run_dir, Selection())
    _say_what_comes_next(draft, path, loaded.recipe.default_run_dir)
    return text


def _say_what_comes_next(draft: Draft, path: Path, run_dir: Path) -> None:
    say(f"{path}: no problems. Next:\n")
    commands = [
        (f"rlhf plan {word(path)}", "says how long all that takes here, and how much memory"),
        (f"rlhf run {word(path)}", "trains and evaluates"),
    ]
    if draft.labels.source == "people":
        commands.insert(1, (f"rlhf label {word(path)}", "samples completions, you rank them; --serve: in a browser"))
        if draft.demonstrations is not None:
            commands.insert(0, (f"rlhf run {word(path)} --to sft", "fine-tunes the model on the demonstrations"))
    commands.append((f"rlhf chat {word(run_dir)}", "talk to the models before and after PPO"))
    width = max(len(command) for command, _ in commands)
    for command, does in commands:
        say(f"  {command:<{width}}   # {does}")
