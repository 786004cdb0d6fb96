"""Resolves and checks the names in a recipe: local paths, hub ids and Python functions.

A relative path is resolved against the current directory first, then against the folder of the recipe, so that
`rlhf run recipes/mine.yaml` and `cd recipes && rlhf run mine.yaml` find the same files.
"""

from __future__ import annotations

import importlib.machinery
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_cli.errors import DataError, ModelError, RLHFError, UsageError, raise_all
from rlhf_cli.models.hub import check_model_name
from rlhf_cli.pipeline.python_source import check_defined
from rlhf_cli.pipeline.remote.fetch import fetch, url_of
from rlhf_cli.recipe.document import KeyPath
from rlhf_cli.recipe.fields import dotted, values
from rlhf_cli.recipe.loader import LoadedRecipe
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.base import External
from rlhf_cli.stages.inputs import Input
from rlhf_cli.storage import is_url


def resolve_paths(loaded: LoadedRecipe, *, downloads: bool = True) -> Recipe:
    """Return the recipe with all local paths valid from the current directory, and the base model's revision in its
    hub id. What is behind URLs is downloaded, or else the URLs remain.

    Raises:
        RLHFError: a URL cannot be read.
        UsageError: `model.path` names another revision than `model.revision`.
    """
    folder = Path() if loaded.path is None else loaded.path.parent
    plain = loaded.recipe.model_dump()
    for key_path, setting, value in values(loaded.recipe):
        if setting.external is None or value is None or not setting.external.applies_to(value):
            continue
        find = _path_or_url if downloads else _path
        if setting.external.what == "function":
            find = _function
        try:
            found = [find(name, folder) for name in value] if isinstance(value, list) else find(value, folder)
        except RLHFError as error:  # of a download
            error.message += f" (`{dotted(key_path)}`)"
            raise
        if isinstance(found, str) and setting.external.what == "model" and value == loaded.recipe.model.path:
            found = _with_revision(found, loaded.recipe.model.revision)
        _put(plain, key_path, found)
    return Recipe.model_validate(plain)


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return a resolved recipe in which the paths of local files and functions are absolute."""
    plain = recipe.model_dump()
    for key_path, setting, value in values(recipe):
        if setting.external is None or value is None or not setting.external.applies_to(value):
            continue
        found = [_absolute(one) for one in value] if isinstance(value, list) else _absolute(value)
        _put(plain, key_path, found)
    return Recipe.model_validate(plain)


def _absolute(name: str) -> str:
    """Return the URL of what was downloaded, or the absolute path of a local file, of `file.py:function` too; other
    names as they are."""
    if (url := url_of(name)) is not None:
        return url
    file, colon, function = name.partition(":") if ".py:" in name else (name, "", "")
    return f"{Path(file).absolute()}{colon}{function}" if Path(file).exists() else name


def _with_revision(name: str, revision: str | None) -> str:
    """Put the revision of a model on the hub into its name; raises `UsageError` if the name has another."""
    if revision is None or is_url(name) or Path(name).exists():
        return name
    model, _, named = name.partition("@")
    if named and named != revision:
        raise UsageError(
            f"`model.path: {name}` names the revision `{named}`, and `model.revision` is `{revision}`",
            hint=f"set `model.path` to `{model}`, or remove `model.revision`",
        )
    return f"{model}@{revision}"


def _put(plain: Any, key_path: KeyPath, value: str | list[str]) -> None:
    for key in key_path[:-1]:
        plain = plain[key]
    plain[key_path[-1]] = value


def _path_or_url(name: str, folder: Path) -> str:
    return fetch(name) if is_url(name) else _path(name, folder)


def _path(name: str, folder: Path) -> str:
    here = Path(name).expanduser()
    if here.exists() or here.is_absolute():
        return str(here)
    beside = folder / name
    return str(beside) if beside.exists() else name


def _function(spec: str, folder: Path) -> str:
    file, colon, function = spec.rpartition(":")
    return f"{_path(file, folder)}:{function}" if colon and file.endswith(".py") else spec


def check_data(name: str, setting: str) -> None:
    """Raise `DataError` unless the name is a local path or may be a hub data set."""
    from rlhf_cli.data.sources import is_hub

    try:
        is_hub(name)
    except DataError as error:
        raise DataError(f"{error.message} (`{setting}`)", hint=error.hint) from error


def check_models(inputs: Iterable[Input]) -> None:
    """Raise `ModelError` unless each model and critic is a local folder or may be a hub id; reports all at once."""
    problems = {}
    for given in inputs:
        check = {"model": check_model, "critic": check_critic}.get(given.kind)
        if check is None:
            continue
        try:
            check(given.source, given.setting)
        except ModelError as error:
            problems[error.message] = error
    raise_all(list(problems.values()))


def check_model(name: str, setting: str) -> None:
    """Raise `ModelError` unless the name is a local folder or may be a hub id."""
    try:
        check_model_name(name)
    except ModelError as error:
        raise ModelError(f"{error.message} (`{setting}`)", hint=error.hint) from error


def check_file(name: str, setting: str) -> None:
    """Raise `DataError` unless the name is a readable, non-empty text file."""
    try:
        text = Path(name).read_bytes().decode("utf-8")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise DataError(f"{name}: {reason} (`{setting}`)", hint="give a text or Markdown file") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: not valid UTF-8 at byte {error.start} (`{setting}`)", hint="save it as UTF-8 text"
        ) from error
    if not text.strip():
        raise DataError(f"{name}: the file is empty (`{setting}`)", hint=f"add text to it, or remove `{setting}`")


def check_critic(name: str, setting: str) -> None:
    """Raise `ModelError` unless the name is the folder of a saved critic."""
    if (Path(name) / "value_head.safetensors").is_file():
        return
    words = ", ".join(f"`{word}`" for word in External.CRITIC_WORDS)
    raise ModelError(
        f"{name}: {'contains no saved critic' if Path(name).is_dir() else 'no such folder'} (`{setting}`)",
        hint=f"use {words}, or the critic of an earlier run, such as runs/NAME/ppo/critic",
    )


def function_file(spec: str, setting: str) -> Path:
    """Return the source file of `file.py:function` or `package.module:function`, without running it.

    Raises:
        UsageError: the file or function does not exist, or was downloaded from the hub.
    """
    module, _, function = spec.rpartition(":")
    if not module or not function.isidentifier():
        raise UsageError(
            f"`{setting}` must name a function; got `{spec}`",
            hint="write `file.py:function` or `package.module:function`",
        )
    if module.endswith(".py"):
        if not Path(module).is_file():
            raise UsageError(f"{module}: no such file (`{setting}`)", hint="write `file.py:function`")
        return _own(Path(module), function, setting)
    search: list[str] | None = None
    found = None
    for depth in range(len(parts := module.split("."))):
        found = importlib.machinery.PathFinder.find_spec(".".join(parts[: depth + 1]), search)
        if found is None:
            raise UsageError(
                f"no Python module `{module}` (`{setting}`)", hint="install it, or write `file.py:function`"
            )
        search = list(found.submodule_search_locations or [])
    if found is None or not found.origin or not Path(found.origin).is_file():
        raise UsageError(f"Python module `{module}` has no source file (`{setting}`)")
    return _own(Path(found.origin), function, setting)


def _own(file: Path, function: str, setting: str) -> Path:
    """Return the file if it defines the function. Code downloaded from the hub is refused: users decide what runs."""
    from huggingface_hub import constants

    caches = [Path(constants.HF_HUB_CACHE), Path(constants.HF_HOME) / "modules"]
    if any(path.is_relative_to(cache.absolute()) for path in (file.absolute(), file.resolve()) for cache in caches):
        raise UsageError(
            f"{file} was downloaded from the hub, and downloaded code is not run (`{setting}`)",
            hint="review it, copy it next to your recipe, and use the copy",
        )
    check_defined(file, function, setting, arguments=0 if setting == "model.attention" else 2)
    return file
