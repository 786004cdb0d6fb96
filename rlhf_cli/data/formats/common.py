"""Shared by the readers of foreign formats: find the prompt and the completions, turn ranks into tiers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rlhf_cli.data.parsing.fields import Columns
from rlhf_cli.data.readers.rows import Row, listed, shown
from rlhf_cli.data.skips import Skip
from rlhf_cli.data.warnings import WarningLog
from rlhf_cli.settings.comparison import ComparisonSettings

Part = Row | Skip
UNRANKED = "completions left unranked"
PROMPT_NAMES = ("prompt", "question", "instruction", "query", "input", "context", "text")


@dataclass(frozen=True)
class ImportOptions:
    """Options for the readers of foreign formats.

    Attributes:
        columns: our field -> theirs, also for nested fields.
        warnings: collects the warnings.
        unranked: also yield completions without a ranking.
        comparison: how the user says that comparisons are read.
    """

    columns: Columns
    warnings: WarningLog
    unranked: bool = False
    comparison: ComparisonSettings | None = None


def new_row(row: Row, location: str, fields: Mapping[str, object], *, may_be_blank: bool = False) -> Row:
    """One of our rows, made from one of theirs; fields that are None are omitted."""
    kept = {name: value for name, value in fields.items() if value is not None}
    return Row(f"{row.location}{location}", kept, may_be_blank=may_be_blank)


def prompt_name(row: Row, fields: Mapping[str, object], completions: Iterable[str], options: ImportOptions) -> str:
    """Name of the prompt field: the mapped one, `prompt`, another usual name, or the only one that is left."""
    mapped = options.columns.get("prompt")
    if isinstance(mapped, str) and mapped in fields:
        return mapped
    taken = set(completions)
    left = [name for name, value in fields.items() if name not in taken and isinstance(value, str | list)]
    for name in PROMPT_NAMES:
        if name in left:
            return name
    if len(left) == 1:
        return left[0]
    raise row.error(
        f"which field is the prompt is not clear: there are {listed(left)}",
        "name it: `--set 'data.columns={prompt: NAME}'`",
    )


_NUMBERED = re.compile(
    r"(?P<stem>.*?)(?:[-_ ]?(?P<number>\d+)|[-_ ](?P<letter>[A-Za-z])|[-_ ]?(?P<side>left|right|Left|Right))"
)


def completion_names(names: Iterable[str]) -> list[str]:
    """Fields whose names differ only by a number, letter or side at the end (`answer1`, `answer2`), in that order.

    Empty if no names differ so, or if several groups of names do.
    """
    groups: dict[str, list[tuple[tuple[int, str], str]]] = {}
    for name in names:
        if found := _NUMBERED.fullmatch(name):
            end = (int(found["number"] or 0), (found["letter"] or found["side"] or "").lower())
            groups.setdefault(found["stem"].lower(), []).append((end, name))
    several = [group for group in groups.values() if len(group) > 1]
    return [name for _, name in sorted(several[0])] if len(several) == 1 else []


def tiers_by_rank(ranks: Sequence[int]) -> list[list[int]]:
    """Tiers of indices, lowest rank first; equal ranks share a tier."""
    return [[index for index, rank in enumerate(ranks) if rank == level] for level in sorted(set(ranks))]


def objects_of(row: Row, field: str, value: object) -> list[tuple[str, dict[str, object]]]:
    """Objects in a list, each with its name for messages."""
    if not isinstance(value, list):
        raise row.error(f"`{field}` is {shown(value)}; a list of objects is expected")
    members = []
    for index, member in enumerate(value):
        name = f"{field}[{index}]"
        if not isinstance(member, dict):
            raise row.error(f"`{name}` is {shown(member)}; an object is expected")
        members.append((name, member))
    return members
