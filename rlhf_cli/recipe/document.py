"""The YAML subset of recipes: YAML 1.2 core values, with the line of every value.

`1e-6` is a float, `no` is text, duplicate keys are errors. Tags, anchors, aliases, several documents, deep nesting and
large files are refused: a recipe must not construct objects or grow on expansion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_cli.errors import RecipeError

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
_NEW = "`rlhf start` writes one for your model and data, `rlhf init DIR` some to start from"

Key = str | int
KeyPath = tuple[Key, ...]
"""Keys and list indices that lead from the top of a recipe to one value."""


@dataclass(frozen=True)
class Document:
    """A parsed YAML text.

    Attributes:
        value: plain dicts, lists and scalars.
        lines: key path -> line (1-based) of its key or list entry.
        texts: key path -> an unquoted scalar as it was written, such as `1e-6` (not 1e-06).
    """

    value: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    texts: dict[KeyPath, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RecipeText:
    """A recipe that is not a file.

    Attributes:
        name: where it was read from, for messages.
        text: the recipe.
    """

    name: str
    text: str


class InvalidYAML(Exception):  # noqa: N818  (internal: the caller adds the name of the source)
    """A text outside the accepted YAML subset; `line` is 1-based."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line
        self.problem = problem


def read_document(source: Path | RecipeText) -> Document:
    """Parse a recipe; raises `RecipeError` with file and line."""
    name, text = (str(source), _read_text(source)) if isinstance(source, Path) else (source.name, source.text)
    try:
        document = parse(text)
    except InvalidYAML as error:
        raise RecipeError([f"{name}:{error.line}: {error.problem}"]) from None
    if document.value is None:
        raise RecipeError([f"{name}: the recipe is empty"], hint=_NEW)
    if not isinstance(document.value, dict):
        kind = "a list" if isinstance(document.value, list) else "a single value"
        raise RecipeError([f"{name}:1: a recipe must be a mapping of sections such as `sft:`; got {kind}"])
    return document


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError([f"{path}: no such recipe"], hint=_NEW) from None
    except IsADirectoryError:
        raise RecipeError([f"{path}: is a folder; give the recipe file inside it"]) from None
    except OSError as error:
        raise RecipeError([f"{path}: cannot be read: {(error.strerror or 'unknown').lower()}"]) from None
    return decode(str(path), raw)


def decode(name: str, raw: bytes) -> str:
    """Return the text of a recipe; raises `RecipeError` for what is too large or not UTF-8."""
    if len(raw) > MAX_BYTES:
        raise RecipeError([f"{name}: larger than 1 MiB, the maximum for a recipe"])
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError([f"{name}:1: encoded as UTF-16; save it as UTF-8"])
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError([f"{name}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; save it as UTF-8"]) from None


def parse(text: str) -> Document:
    """Parse YAML text; raises `InvalidYAML`."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError, YAMLStreamError

    try:
        return _Builder(YAML(typ="safe", pure=True).parse(text)).document()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        raise InvalidYAML(line, f"not valid YAML: {_explain(error.problem or error.context or 'unknown')}") from None
    except (YAMLError, YAMLStreamError) as error:  # ruamel's reader: characters YAML does not allow
        position = getattr(error, "position", 0)
        line = text.count("\n", 0, position) + 1 if isinstance(position, int) else 1
        raise InvalidYAML(line, f"not valid YAML: {str(error).splitlines()[0]}") from None


def _explain(problem: str) -> str:
    if r"'\t'" in problem or "\t" in problem:
        return "a tab in the indentation; use spaces"
    if "mapping values are not allowed" in problem:
        return "a second `:` on this line; put text that contains `: ` in quotes"
    if "cannot start any token" in problem:
        return f"{problem}; put text that starts with it in quotes"
    if "<stream end>" in problem or "end of stream" in problem:
        return "an unclosed bracket or quote"
    return problem


class _Builder:
    """Builds plain values from parser events and records their lines."""

    def __init__(self, events: Iterator[Any]) -> None:
        self._events = events
        self._lines: dict[KeyPath, int] = {}
        self._texts: dict[KeyPath, str] = {}

    def document(self) -> Document:
        value: Any = None
        documents = 0
        for event in self._events:
            kind = type(event).__name__
            if kind == "DocumentStartEvent":
                documents += 1
                if documents > 1:
                    raise InvalidYAML(
                        event.start_mark.line + 1, "a second document; a recipe must be a single document"
                    )
            elif kind not in ("StreamStartEvent", "StreamEndEvent", "DocumentEndEvent"):
                value = self._node(event, ())
        if documents == 0:
            self._texts[()] = ""
        return Document(value, self._lines, self._texts)

    def _node(self, event: Any, key_path: KeyPath) -> Any:
        line = event.start_mark.line + 1
        self._lines.setdefault(key_path, line)
        kind = type(event).__name__
        if kind == "AliasEvent" or getattr(event, "anchor", None):
            raise InvalidYAML(line, "anchors and aliases (`&name`, `*name`) are not allowed; write out the value")
        if getattr(event, "ctag", None) is not None:
            raise InvalidYAML(line, f"tags are not allowed; got `{event.ctag}`")
        if len(key_path) >= MAX_DEPTH:
            raise InvalidYAML(line, f"nested deeper than {MAX_DEPTH} levels")
        if kind == "MappingStartEvent":
            return self._mapping(key_path)
        if kind == "SequenceStartEvent":
            return self._sequence(key_path)
        if event.style is None:  # plain; quoted and block scalars are always text
            self._texts[key_path] = event.value
            return plain_scalar(event.value)
        return event.value

    def _mapping(self, key_path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        while type(event := next(self._events)).__name__ != "MappingEndEvent":
            line = event.start_mark.line + 1
            if type(event).__name__ != "ScalarEvent":
                raise InvalidYAML(line, "a key must be a scalar")
            if event.anchor or event.ctag is not None:
                raise InvalidYAML(line, "anchors and tags are not allowed")
            key = event.value
            if key in mapping:
                first = self._lines[(*key_path, key)]
                raise InvalidYAML(line, f"`{key}` is given twice; the first is on line {first}")
            self._lines[(*key_path, key)] = line
            mapping[key] = self._node(next(self._events), (*key_path, key))
        return mapping

    def _sequence(self, key_path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while type(event := next(self._events)).__name__ != "SequenceEndEvent":
            items.append(self._node(event, (*key_path, len(items))))
        return items


_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_RADIX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **{sign + word: float(sign + "inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")},
}


def plain_scalar(text: str) -> Any:
    """Return the value of an unquoted scalar by the core schema of YAML 1.2, which is extended by `10_000`."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) < 400:  # int() refuses very long digit strings
        if _INT.fullmatch(text):
            return int(text)
        if _RADIX.fullmatch(text):
            return int(text, 0)
        if _FLOAT.fullmatch(text):
            return float(text)
    return text
