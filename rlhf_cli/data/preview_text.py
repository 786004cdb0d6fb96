"""A preview of records for people: colored on a terminal, and readable without color by the names on the left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlhf_cli.data.preview import RecordPreview, Role, Token
from rlhf_cli.plain_text import printable

_STYLES: dict[Role, str] = {
    "prompt": "",
    "trained": "green",
    "completion": "cyan",
    "end": "bold magenta",
    "cut": "red strike",
}
_MEANINGS: dict[Role, str] = {
    "prompt": "read, not trained",
    "trained": "trained by SFT",
    "completion": "scored by a reward model",
    "end": "what ends a completion",
    "cut": "too long, not read by a reward model",
}
_NAME_WIDTH = max(map(len, _STYLES))
_HEAD, _TAIL = 300, 200
"""Characters of a long part that are shown; `--json` has all."""


def preview_text(records: Sequence[RecordPreview]) -> RenderableType:
    """Lay out records: where they are from, why they are skipped, and their tokens, parts with one role together."""
    shown: set[Role] = {token.role for record in records for tokens in record.sequences.values() for token in tokens}
    return Group(*(part for record in records for part in _record(record)), _legend(shown))


def _record(record: RecordPreview) -> Iterator[RenderableType]:
    yield Text(record.location, style="bold")
    if record.skipped is not None:
        excerpt = f" ({printable(record.excerpt)!r})" if not record.sequences and record.excerpt else ""
        yield Text(f"skipped: {record.skipped}{excerpt}", style="yellow")
    for name, tokens in record.sequences.items():
        yield Text(", ".join(part for part in (name, _counts(tokens)) if part))
        table = Table.grid(padding=(0, 1))
        table.add_column(width=_NAME_WIDTH, style="dim")
        table.add_column(overflow="fold")
        for _, group in groupby(tokens, key=lambda token: token.role):
            part = list(group)
            table.add_row(part[0].role, _part([token.text for token in part], _STYLES[part[0].role]))
        yield table
    yield Text()


def _counts(tokens: Sequence[Token]) -> str:
    counts = Counter(token.role for token in tokens)
    parts = ", ".join(f"{count:,} {role}" for role, count in counts.items())
    return f"{len(tokens):,} tokens: {parts}"


def _part(texts: Sequence[str], style: str) -> Text:
    """Tokens of one role; every other one is underlined, so that a color terminal shows where they begin."""
    length = sum(map(len, texts))
    found, position, is_omitted = Text(), 0, False
    for number, text in enumerate(texts):
        beyond = length > 2 * (_HEAD + _TAIL) and _HEAD < position < length - _TAIL
        if beyond and not is_omitted:
            found.append(" ... ", style="dim")
        is_omitted = beyond
        position += len(text)
        if not beyond:
            at_edge = number in (0, len(texts) - 1)
            found.append(_visible(text, at_edge), style=f"{style} underline" if number % 2 else style)
    if found.plain.endswith("\n"):
        found.right_crop(1)
    return found


def _visible(text: str, at_edge: bool) -> str:
    """Show line breaks, and spaces where a part begins or ends."""
    if at_edge:
        stripped = text.strip(" ")
        text = text.replace(" ", "␣") if not stripped else _edge(text, stripped)
    return printable(text.replace("\r", "␍")).replace("\n", "⏎\n")


def _edge(text: str, stripped: str) -> str:
    start = text.index(stripped)
    return "␣" * start + stripped + "␣" * (len(text) - start - len(stripped))


def _legend(roles: set[Role]) -> Text:
    lines = [f"{role:<{_NAME_WIDTH}} {meaning}" for role, meaning in _MEANINGS.items() if role in roles]
    return Text("\n".join([*lines, "⏎ line break, ␣ space at the edge of a part"]), style="dim")
