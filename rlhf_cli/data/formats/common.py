"""What the readers of foreign forms share: which field is the prompt, which are the answers, tiers from ranks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rlhf_cli.data.rows import Row, listed, shown
from rlhf_cli.data.skips import Skip
from rlhf_cli.data.warnings import Remarks

Part = Row | Skip
UNRANKED = "answers left unranked"
PROMPT_NAMES = ("prompt", "question", "instruction", "query", "input", "context", "text")


@dataclass(frozen=True)
class Wanted:
    """What a reader of a foreign form needs to know.

    Attributes:
        columns: our field -> theirs, also for fields that stand deeper in a row.
        remarks: collects what deserves a warning.
        unranked: answers that nobody ranked are wanted too.
    """

    columns: Mapping[str, str]
    remarks: Remarks
    unranked: bool = False


def part(row: Row, place: str, fields: Mapping[str, object], *, may_be_blank: bool = False) -> Row:
    """A row of ours made from one of theirs; what is None is left out."""
    kept = {name: value for name, value in fields.items() if value is not None}
    return Row(f"{row.place}{place}", kept, may_be_blank=may_be_blank)


def prompt_name(row: Row, fields: Mapping[str, object], answers: Iterable[str], wanted: Wanted) -> str:
    """Name of the field that holds the prompt: the one that is mapped, `prompt`, a usual name, or the only one left."""
    mapped = wanted.columns.get("prompt")
    if mapped is not None and mapped in fields:
        return mapped
    taken = set(answers)
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


def answer_names(names: Iterable[str]) -> list[str]:
    """Fields named alike but for a number, letter or side at the end (`answer1`, `answer2`), in the order of these.

    Empty where no family of names is so, or more than one: nobody can tell which.
    """
    families: dict[str, list[tuple[tuple[int, str], str]]] = {}
    for name in names:
        if found := _NUMBERED.fullmatch(name):
            end = (int(found["number"] or 0), (found["letter"] or found["side"] or "").lower())
            families.setdefault(found["stem"].lower(), []).append((end, name))
    several = [family for family in families.values() if len(family) > 1]
    return [name for _, name in sorted(several[0])] if len(several) == 1 else []


def tiers_by_rank(ranks: Sequence[int]) -> list[list[int]]:
    """Tiers of indices, lowest rank first; equal ranks share one."""
    return [[index for index, rank in enumerate(ranks) if rank == level] for level in sorted(set(ranks))]


def each(row: Row, field: str, value: object) -> list[tuple[str, dict[str, object]]]:
    """Members of a list of objects, each with the name by which a message calls it."""
    if not isinstance(value, list):
        raise row.error(f"`{field}` is {shown(value)}; a list of objects is expected")
    members = []
    for index, member in enumerate(value):
        name = f"{field}[{index}]"
        if not isinstance(member, dict):
            raise row.error(f"`{name}` is {shown(member)}; an object is expected")
        members.append((name, member))
    return members
