"""Settings from the command line: `--set a.b=c` and flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlhf_cli.recipe.document import Document, InvalidYAML, Key, KeyPath, parse
from rlhf_cli.recipe.fields import dotted, is_section
from rlhf_cli.storage import without_secrets


@dataclass(frozen=True)
class Override:
    """One setting from the command line.

    Attributes:
        key_path: keys that lead to the setting.
        document: its value, with the text as written.
        origin: the command-line text shown in messages and `recipe show`, such as `--set ppo.steps=3` or `--seed 7`.
    """

    key_path: KeyPath
    document: Document
    origin: str


def override(setting: str, value: Any, origin: str) -> Override:
    """Return an override with a value that is not parsed: a path may look like a number."""
    return Override(key_path_of(setting), Document(value), without_secrets(origin))


def parse_set(text: str) -> Override:
    """Parse `a.b=c`; raises `BadSetting`."""
    origin = without_secrets(f"--set {text}")
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not name or any(not part for part in name.split(".")):
        raise BadSetting(f"{origin}: expected SETTING=VALUE, such as ppo.learning_rate=1e-6")
    try:
        return Override(key_path_of(name), parse(value), origin)
    except InvalidYAML as error:
        raise BadSetting(f"{origin}: {error.problem}") from None


class BadSetting(Exception):  # noqa: N818  (internal: the loader collects these with the problems of the recipe)
    """A command-line setting that cannot be applied."""


@dataclass
class Layers:
    """The plain values of a recipe and their origins.

    Attributes:
        data: nested dicts, lists and scalars.
        origins: key path -> `file:line` or command-line text.
        texts: key path -> scalar as written.
    """

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    texts: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, key_path: KeyPath) -> str | None:
        """Return the origin of a value, or of the closest enclosing value."""
        for length in range(len(key_path), 0, -1):
            if key_path[:length] in self.origins:
                return self.origins[key_path[:length]]
        return self.origins.get(())  # the whole recipe: a file without a line

    def add_file(self, name: str, document: Document) -> None:
        """Start from a recipe file."""
        self.data = document.value
        self.origins = {key_path: f"{name}:{line}" for key_path, line in document.lines.items()}
        self.origins[()] = name
        self.texts = dict(document.texts)

    def add(self, override: Override) -> None:
        """Apply one override, creating missing sections; raises `BadSetting`."""
        here: Any = self.data
        *way, last = override.key_path
        for depth, key in enumerate(way):
            here = self._enter(here, key, override, depth)
        self._assign(here, last, override)
        self._forget(override.key_path)
        self.origins[override.key_path] = override.origin
        for key_path in override.document.lines:
            self.origins[override.key_path + key_path] = override.origin
        for key_path, text in override.document.texts.items():
            self.texts[override.key_path + key_path] = text

    def _enter(self, here: Any, key: Key, override: Override, depth: int) -> Any:
        key_path = override.key_path[: depth + 1]
        if isinstance(here, list):
            return here[self._index(here, key, override, depth)]
        if key not in here or here[key] is None:
            here[key] = {}
            self.origins[key_path] = override.origin
        if not isinstance(here[key], dict | list):
            raise BadSetting(f"{override.origin}: `{dotted(key_path)}` is a single value and has no settings")
        return here[key]

    def _assign(self, here: Any, key: Key, override: Override) -> None:
        depth = len(override.key_path) - 1
        if isinstance(here, dict):
            here[key] = override.document.value
            return
        index = self._index(here, key, override, depth, past_end=1)
        here[index : index + 1] = [override.document.value]

    @staticmethod
    def _index(here: list[Any], key: Key, override: Override, depth: int, past_end: int = 0) -> int:
        name = dotted(override.key_path[:depth])
        if not isinstance(key, int):
            raise BadSetting(f"{override.origin}: `{name}` is a list; give the number of an entry, such as `{name}.0`")
        if key >= len(here) + past_end:
            raise BadSetting(f"{override.origin}: `{name}` has {len(here)} entries, numbered from 0")
        return key

    def _forget(self, key_path: KeyPath) -> None:
        """Forget the origins and texts of a value that is replaced."""
        for table in (self.origins, self.texts):
            for old in [known for known in table if known[: len(key_path)] == key_path]:
                del table[old]

    def open_sections(self) -> None:
        """Create sections given as a bare key: `ppo:` means the section with its defaults, `ppo: null` means none."""
        for key_path, text in self.texts.items():
            if text == "" and is_section(key_path):
                self._open(key_path)

    def _open(self, key_path: KeyPath) -> None:
        here: Any = self.data
        for key in key_path[:-1]:
            here = here[key]
        if here[key_path[-1]] is None:  # otherwise an override has filled it
            here[key_path[-1]] = {}


def key_path_of(name: str) -> KeyPath:
    """Return the key path of a setting as written in `--set`, such as `ppo.rewards.0.weight`."""
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))
