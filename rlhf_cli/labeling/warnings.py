"""Warnings about the quality of labels, from annotators and judges alike."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from rlhf_cli.files import reading_artifact
from rlhf_cli.plain_text import printable

ALL_LABELS = "all labels"
WARNINGS, OF_JUDGES = "warnings.json", "judge.json"
"""Files of an artifact with the warnings about people's labels, and with those about judges among other things."""


@dataclass(frozen=True)
class LabelWarning:
    """A problem that the person who runs the labeling should act on.

    Attributes:
        kind: a short, stable name.
        about: the annotator, judge or prompt, or `ALL_LABELS`.
        text: what was found, with the measured value.
        advice: what to do.
        is_doubt: whether it puts in doubt what is learned from the labels, or decided by them.
    """

    kind: str
    about: str
    text: str
    advice: str
    is_doubt: bool = field(kw_only=True)


def one_line(text: str) -> str:
    """Untrusted text on one line, without control characters."""
    return " ".join(printable(text).split())


def rendered(warnings: Sequence[LabelWarning]) -> Iterator[RenderableType]:
    """Rich renderables: a heading, and two paragraphs per warning."""
    if warnings:
        yield Text(f"{len(warnings):,} {'warning' if len(warnings) == 1 else 'warnings'}", style="bold yellow")
    for warning in warnings:
        yield Text.assemble((f"{one_line(warning.about)}: ", "bold"), one_line(warning.text))
        yield Padding(Text(warning.advice, style="dim"), (0, 0, 0, 3))


def in_one_line(warning: LabelWarning) -> str:
    """The warning as one line, for the log."""
    return f"{one_line(warning.about)}: {one_line(warning.text)}; {warning.advice}"


def write_warnings(folder: Path, warnings: Sequence[LabelWarning]) -> None:
    """Write the warnings about people's labels into an artifact."""
    text = json.dumps([asdict(one) for one in warnings], indent=2, ensure_ascii=False)
    (folder / WARNINGS).write_text(text + "\n", encoding="utf-8")


def doubtful_warnings(folder: Path) -> list[LabelWarning]:
    """The warnings of an artifact that put in doubt what is learned from its labels, or decided by them.

    Raises:
        DataError: a file of them is damaged.
    """
    found: list[LabelWarning] = []
    for path in (folder / WARNINGS, folder / OF_JUDGES):
        if path.is_file():
            with reading_artifact(path):
                content = json.loads(path.read_text(encoding="utf-8"))
                rows = content if path.name == WARNINGS else content.get("warnings", [])
                found += map(_read, rows)
    return [one for one in found if one.is_doubt]


def _read(row: dict[str, Any]) -> LabelWarning:
    complete: dict[str, Any] = {"is_doubt": True} | row  # files of earlier versions lack it: better shown than hidden
    return LabelWarning(**{part.name: complete[part.name] for part in fields(LabelWarning)})
