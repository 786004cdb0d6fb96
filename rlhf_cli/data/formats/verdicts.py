"""Verdicts of comparisons to tiers: a winner, a signed strength, scores or ranks.

A verdict is never guessed: what could be meant in two ways is an error that names the setting which decides.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_cli.data.parsing.fields import is_empty, yaml_name
from rlhf_cli.data.readers.rows import Row, shown
from rlhf_cli.settings.comparison import ComparisonSettings

Tiers = list[list[int]]
_TIES = frozenset({"tie", "tied", "ties", "equal", "same", "draw", "both", "neither", "bothbad", "bothgood"})
_STEMS = re.compile(
    r"^(model|assistant|response|answer|completion|output|option|candidate|conversation|summary|text|reply)"
)
_SIDES = {"left": 0, "right": 1, "first": 0, "second": 1}


@dataclass(frozen=True)
class Verdict:
    """Tiers of the completions, and how much better the first is, if the file says so."""

    tiers: Tiers
    margin: float | None = None


def by_winner(
    row: Row, field: str, value: object, names: Sequence[str], how: ComparisonSettings | None = None
) -> Verdict | None:
    """The winner above all others, or all in one tier; None without a verdict.

    Args:
        row: for messages.
        field: name of the verdict, for messages.
        value: a winner, or a list of them.
        names: of the completions.
        how: says what values mean that are not names, letters, numbers or sides of the completions.
    """
    if is_empty(value):
        return None
    winners: set[int] = set()
    for one in _listed(value):
        if how is not None and how.values.get(_text(one)) == "skip":
            return None
        found = _winner(row, field, one, names, how)
        winners |= set(range(len(names))) if found is None else {found}
    others = [index for index in range(len(names)) if index not in winners]
    return Verdict([tier for tier in (sorted(winners), others) if tier])


def _listed(value: object) -> list[object]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    return value if isinstance(value, list) else [value]


def _winner(row: Row, field: str, value: object, names: Sequence[str], how: ComparisonSettings | None) -> int | None:
    """Index of the winner; None is a tie."""
    text, values = _text(value), {} if how is None else how.values
    meant = values.get(text, text)
    if meant in names:
        return list(names).index(meant)
    if text in values and meant.isdigit() and int(meant) < len(names):
        return int(meant)
    if _is_tie(meant):
        return None
    known = aliases(names)
    for key in _keys(meant):
        if key in known:
            return known[key]
    raise row.error(
        f"`{field}` is {shown(value)}, and which of {', '.join(f'`{name}`' for name in names)} that means is not clear",
        _values_hint(text, names, how),
    )


def _values_hint(text: str, names: Sequence[str], how: ComparisonSettings | None) -> str:
    if how is None:
        return f"name one of them, or `tie`: {', '.join(names)}"
    columns = ", ".join(map(yaml_name, how.completions))
    first = names[0] if len(how.completions) > 1 else "0"
    known = "".join(f"{yaml_name(value)}: {yaml_name(meant)}, " for value, meant in how.values.items())
    parts = [f"completions: [{columns}]", f"verdict: {yaml_name(str(how.verdict))}"]
    parts += [f"{name}: {yaml_name(value)}" for name in ("prompt", "annotator") if (value := getattr(how, name))]
    parts.append(f"values: {{{known}{yaml_name(text)}: {yaml_name(first)}}}")
    return f"say what each value means, a completion or `tie`: `--set 'data.comparison={{{', '.join(parts)}}}'`"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value).strip()
    return text.removesuffix(".0") if re.fullmatch(r"-?\d+\.0", text) else text.lower() if text in _BOOLEANS else text


_BOOLEANS = ("True", "False")


def aliases(names: Sequence[str]) -> dict[str, int]:
    """What else may be said for a completion: the plain name, its letter, its own number, and its side of two."""
    ends = [_plain(name) for name in names]
    known = {end: index for index, end in enumerate(ends)}
    suffixes = [re.search(r"(\d+|[a-z])$", end) for end in ends]
    has_numbers = all(found is not None and found[0].isdigit() for found in suffixes)
    if has_numbers or all(re.search(r"(^|[-_ ])[A-Za-z]$|[a-z][A-Z]$", name) for name in names):
        known |= {found[0]: index for index, found in enumerate(suffixes) if found is not None}
    if "a" not in known:
        known |= {chr(ord("a") + index): index for index in range(min(len(names), 26))}
    if len(names) == 2:
        known |= {side: index for side, index in _SIDES.items() if side not in known}
    return known


def is_winner(value: object, names: Sequence[str]) -> bool:
    """Whether a value, or each of a list, says by itself which completion is best, or that they tie."""
    values = value if isinstance(value, list) else [value]
    known = aliases(names)
    return bool(values) and all(
        isinstance(one, str) and (_is_tie(one) or not known.keys().isdisjoint(_keys(one))) for one in values
    )


def _keys(text: str) -> tuple[str, str]:
    """What a value is looked up by: as it is, and without a word such as `response` before it."""
    plain = _plain(text)
    return plain, _STEMS.sub("", plain)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _is_tie(text: str) -> bool:
    return _plain(text) in _TIES or _plain(text).startswith("tie")


def by_strength(row: Row, field: str, value: object, count: int) -> Verdict | None:
    """The first of two if the number is negative, else the second; its size is the margin."""
    number = number_of(row, field, value)
    if number is None:
        return None
    if count != 2:
        raise row.error(f"`{field}` is a strength, and there are {count} completions", "a strength compares two")
    if number == 0:
        return Verdict([[0, 1]])
    return Verdict([[0], [1]] if number < 0 else [[1], [0]], abs(number))


def by_numbers(row: Row, field: str, value: object, count: int, *, highest_first: bool) -> Verdict | None:
    """Tiers by a number per completion; equal numbers share a tier. None if a number is missing."""
    values = _listed(value)
    if is_empty(value) or any(is_empty(one) for one in values):
        return None
    if len(values) != count:
        raise row.error(
            f"`{field}` has {len(values)} values for {count} completions: {shown(value)}", "give one per completion"
        )
    numbers = [number_of(row, field, one) or 0.0 for one in values]
    levels = sorted(set(numbers), reverse=highest_first)
    return Verdict([[index for index, number in enumerate(numbers) if number == level] for level in levels])


def number_of(row: Row, field: str, value: object) -> float | None:
    """A finite number, which may be written as text; None for an empty cell."""
    if is_empty(value):
        return None
    number = math.nan
    if isinstance(value, bool | int | float):
        number = float(value)
    elif isinstance(value, str):
        text = value.strip().lower()
        try:
            number = {"true": 1.0, "false": 0.0}[text] if text in ("true", "false") else float(text)
        except ValueError:
            number = math.nan
    if not math.isfinite(number):
        raise row.error(
            f"`{field}` is {shown(value)}; a finite number is expected", "leave it empty where it is unknown"
        )
    return number
