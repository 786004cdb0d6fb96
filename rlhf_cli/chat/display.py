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

from rlhf_cli.chat.conversation import Reply
from rlhf_cli.labeling.terminal.wrapping import wrap

_SIDE_BY_SIDE, _COLUMN = 100, 22
"""Fewest cells of a terminal in which replies are side by side, and of each column."""
_GAP = 3
_NAME = "bold cyan"
_WIDEST = 100
"""Cells of a reply below the other: longer lines are tiring to read."""
_REDRAW = 0.08
"""Seconds between two pictures of replies that are being written."""
_HEADS = 6
"""Lines around the texts of replies side by side while they are written."""
_BETWEEN = 4
"""Lines around the text of a reply below the other."""


@dataclass
class _Block:
    """A reply on the screen: its text so far, and the line below it."""

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
        return width if count > 1 and self._console.width >= _SIDE_BY_SIDE and width >= _COLUMN else 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Context of the replies to one prompt: what they are at its end, even if it is interrupted, stays."""
        self._blocks = {name: _Block() for name in self._names}
        try:
            yield
        finally:
            if self._live is not None:
                self._live.stop()
                self._live = None
            if any(block.text or block.metrics for block in self._blocks.values()):
                self._console.print(self._picture(is_whole=True))
                self._console.print()

    def show(self, name: str, text: str) -> None:
        """Show the text of a model's reply so far."""
        self._blocks[name].text = text
        self._redraw()

    def finish(self, reply: Reply) -> None:
        """Show a whole reply with its metrics."""
        block = self._blocks[reply.model]
        block.text, block.metrics, block.is_written = reply.completion.text, metrics(reply), True
        self._redraw()

    def _redraw(self) -> None:
        """Draw what is written so far, on a terminal and not too often."""
        if self._console.is_terminal and self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        now = time.monotonic()
        if self._live is not None and now - self._drawn >= _REDRAW:
            self._drawn = now
            self._live.update(self._picture(is_whole=False), refresh=True)

    def _picture(self, *, is_whole: bool) -> RenderableType:
        """Return all replies; while they are written, their last lines, as many as the screen has room for."""
        screen = self._console.height
        if self._column:
            return self._columns(None if is_whole else max(3, screen - _HEADS))
        height = None if is_whole else max(1, screen // len(self._names) - _BETWEEN)
        return Group(*(part for name in self._names for part in self._one(name, height)))

    def _columns(self, height: int | None) -> RenderableType:
        table = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
        for _ in self._names:
            table.add_column(width=self._column, no_wrap=True)
        table.add_row(*(_wrapped(name, self._column, _NAME) for name in self._names))
        table.add_row(*(_body(self._blocks[name], self._column, height) for name in self._names))
        table.add_row(*(_wrapped(self._blocks[name].metrics, self._column, "dim") for name in self._names))
        return table

    def _one(self, name: str, height: int | None) -> Iterator[RenderableType]:
        width, block = min(self._console.width, _WIDEST), self._blocks[name]
        if name != self._names[0]:
            yield Text("")
        yield _wrapped(name, width, _NAME)
        yield _body(block, width, height)
        if block.metrics:
            yield _wrapped(block.metrics, width, "dim")


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
