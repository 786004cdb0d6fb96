"""Replies in the terminal: in columns side by side where there is room, else one below the other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rlhf_cli.chat.conversation import Reply, Show
from rlhf_cli.chat.models import ChatModel
from rlhf_cli.labeling.terminal.wrapping import wrap

_COLUMN = 36
"""Fewest cells of a column."""
_GAP = 3
_WIDEST = 100
"""Cells of a reply below the other: longer lines are tiring to read."""
_REDRAW = 0.08
"""Seconds between two pictures of a reply that is being written."""
_HEADS = 4
"""Lines around the text of a reply while it is written."""


@dataclass
class _Block:
    """An reply on the screen: its text so far, and the line below it."""

    text: str = ""
    metrics: str = ""
    is_written: bool = False


class Display:
    """Shows replies while they are written; on anything but a terminal, when they are finished.

    Args:
        console: to print on.
        names: of the models, in the order in which they reply.
    """

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self._console, self._names = console, list(names)
        self._blocks: dict[str, _Block] = {}
        self._live: Live | None = None
        self._drawn = 0.0

    @property
    def _column(self) -> int:
        """Cells of a column; 0 if replies go one below the other."""
        count = len(self._names)
        width = (self._console.width - _GAP * (count - 1)) // count
        return width if count > 1 and width >= _COLUMN else 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Context of the replies to one prompt."""
        self._blocks = {name: _Block() for name in self._names}
        try:
            yield
        finally:
            self._end_live()
            if self._column and any(block.text or block.metrics for block in self._blocks.values()):
                self._console.print(self._columns(height=None))
                self._console.print()

    def show(self, model: ChatModel) -> Show:
        """Return what is told of the tokens of a model's reply."""
        block = self._blocks[model.name]
        if self._console.is_terminal and self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

        def told(text: str) -> None:
            block.text = text
            now = time.monotonic()
            if self._live is not None and now - self._drawn >= _REDRAW:
                self._drawn = now
                self._live.update(self._picture(model.name), refresh=True)

        told("")
        return told

    def finish(self, reply: Reply) -> None:
        """Show a whole reply with its metrics."""
        block = self._blocks[reply.model]
        block.text, block.metrics, block.is_written = reply.completion.text, metrics(reply), True
        if not self._column:
            self._end_live()
            self._console.print(self._one(reply.model, height=None))
            self._console.print()

    def _end_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _picture(self, name: str) -> RenderableType:
        """Return what is on the screen while a model replies; its last lines, if it is longer than the screen."""
        height = max(3, self._console.height - _HEADS)
        return self._columns(height=height) if self._column else self._one(name, height=height)

    def _columns(self, *, height: int | None) -> RenderableType:
        table = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
        for _ in self._names:
            table.add_column(width=self._column, no_wrap=True)
        table.add_row(*(Text(name, style="bold cyan") for name in self._names))
        table.add_row(*(_body(self._blocks[name], self._column, height) for name in self._names))
        table.add_row(*(_wrapped(self._blocks[name].metrics, self._column, "dim") for name in self._names))
        return table

    def _one(self, name: str, *, height: int | None) -> RenderableType:
        width, block = min(self._console.width, _WIDEST), self._blocks[name]
        parts = [Text(name, style="bold cyan"), _body(block, width, height)]
        return Group(*parts, *([_wrapped(block.metrics, width, "dim")] if block.metrics else []))


def metrics(reply: Reply) -> str:
    """Return the line below a reply."""
    count = len(reply.completion.ids)
    parts = [] if reply.reward is None else [f"reward {reply.reward:+.2f}"]
    if reply.kl is not None:
        parts.append(f"log-ratio to {reply.reference} {reply.kl:+.1f} nats")
    parts.append(f"{count:,} {'token' if count == 1 else 'tokens'}")
    if not reply.completion.finished:
        parts.append("cut at the limit")
    return " · ".join(parts)


def _body(block: _Block, width: int, height: int | None) -> Text:
    text = block.text.strip()
    if not text and block.is_written:
        return Text("(empty)", style="dim")
    whole = _wrapped(text, width, "")
    rows = whole.split("\n")
    if height is None or len(rows) <= height:
        return whole
    return Text("\n").join(rows[-height:])


def _wrapped(text: str, width: int, style: str) -> Text:
    """Wrap text that a model wrote; control characters in it become visible codes."""
    rows = ["".join(piece.text for piece in row) for row in wrap(text, width)]
    return Text("\n".join(rows), style=style)
