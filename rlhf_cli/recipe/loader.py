"""Loads a frozen `Recipe` from a recipe file and command-line settings, with the origin of every value."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from rlhf_cli.errors import RecipeError, UsageError
from rlhf_cli.recipe.document import KeyPath, RecipeText, read_document
from rlhf_cli.recipe.fields import dotted, values
from rlhf_cli.recipe.overrides import BadSetting, Layers, Override, override, parse_set
from rlhf_cli.recipe.problems import explain
from rlhf_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and the origin of its values.

    Attributes:
        recipe: the settings, with paths as written.
        path: the recipe file; None if there is none.
        origins: key path -> `file:line` or command-line text; absent for defaults.
        text: the recipe as it was read, if it is not a file.
    """

    recipe: Recipe
    path: Path | None
    origins: Mapping[KeyPath, str]
    text: RecipeText | None = None

    def origin(self, key_path: KeyPath) -> str:
        """Return where a value came from; `default` if it was not set."""
        for length in range(len(key_path), 0, -1):
            if (found := self.origins.get(key_path[:length])) is not None:
                return found if length == len(key_path) else "default"
        return "default"

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Turn a `UsageError` about a setting into a `RecipeError` that says where the setting is, as the loader does.

        Settings that the model's folder or a default gives have no place in the recipe; their errors stay as they are.
        """
        try:
            yield
        except UsageError as error:
            key_path = self._refused(error)
            if key_path is None:
                raise
            name = dotted(key_path)
            message = error.message.replace(f"`{error.setting}", f"`{name}", 1)
            raise RecipeError([f"{self.origins[key_path]}: {message}"], hint=error.hint) from error

    def _refused(self, error: UsageError) -> KeyPath | None:
        """Return the key path of the setting that an error is about, if the recipe or the command line sets it."""
        if error.setting is None:
            return None
        for key_path, _, value in values(self.recipe):
            name = dotted(key_path)
            if name != error.setting and not name.endswith(f".{error.setting}"):
                continue
            is_it = error.value is None or value == error.value or (isinstance(value, list) and error.value in value)
            if is_it and key_path in self.origins:
                return key_path
        return None


def load_recipe(
    source: Path | RecipeText | None,
    settings: Sequence[str] = (),
    overrides: Sequence[Override] = (),
    *,
    section: str | None = None,
) -> LoadedRecipe:
    """Read a recipe, apply overrides and validate.

    Args:
        source: the recipe; None starts from an empty recipe.
        settings: values of `--set`; they take precedence over `overrides`.
        overrides: settings from flags.
        section: section to create if the recipe has none: that of a single-stage command.

    Raises:
        RecipeError: lists all problems at once, each with its location.
    """
    layers = Layers()
    if source is not None:
        layers.add_file(source.name if isinstance(source, RecipeText) else str(source), read_document(source))
    problems = []
    if section is not None and layers.data.get(section) is None:
        layers.add(override(section, {}, "command line"))
    for make in (*(lambda given=given: given for given in overrides), *(lambda s=s: parse_set(s) for s in settings)):
        try:
            layers.add(make())
        except BadSetting as error:
            problems.append(str(error))
    layers.open_sections()
    try:
        recipe = Recipe.model_validate(copy.deepcopy(layers.data))
    except ValidationError as error:
        raise RecipeError([*explain(error, layers), *problems]) from None
    if problems:
        raise RecipeError(problems)
    path, text = (None, source) if isinstance(source, RecipeText) else (source, None)
    return LoadedRecipe(recipe, path, layers.origins, text)
