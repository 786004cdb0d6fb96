"""stderr for messages: what is printed is also written to the log of the run; `--quiet` hides it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.control import Control

from rlhf_cli import run_log
from rlhf_cli.distributed.ranks import is_main
from rlhf_cli.echo import without_echo
from rlhf_cli.verbosity import is_quiet

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import ConsoleOptions, RenderableType, RenderResult
    from rich.progress import Progress
    from rich.progress import Task as RichTask

    from rlhf_cli.bar_text import BarText


def interactive() -> bool:
    """Whether stderr is a terminal that a person may watch, and neither `--quiet` nor a CI variable is set."""
    return sys.stderr.isatty() and not (is_quiet() or os.environ.get("CI") or os.environ.get("TERM") == "dumb")


class Messages(Console):
    """stderr, and the log of the run beside it."""

    is_muted = False

    @property
    def file(self) -> IO[str]:
        """stderr itself: what is printed here is logged below, without colors and redrawn bars."""
        return run_log.under(Console.file.fget(self))  # type: ignore[misc]  (a property of the class)

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def print(self, *objects: Any, always: bool = False, shown: bool = True, **options: Any) -> None:
        """Print, unless `--quiet` is given, and log.

        Args:
            objects: see rich.
            always: also print under `--quiet`.
            shown: False logs only.
            options: see rich.
        """
        is_drawing = all(isinstance(one, Control) for one in objects)  # a spinner or a bar
        if shown and (always or not is_quiet()) and (is_drawing or not self.is_muted):
            super().print(*objects, **options)
        if run_log.is_open() and not is_drawing:
            text, merged = io.StringIO(), {"soft_wrap": True, **options}
            plain = Console(file=text, width=self.width, color_system=None, highlight=False, emoji=False)
            plain.print(*objects, **merged)
            run_log.write(text.getvalue())


# rich would write `data.jsonl:100:` with the emoji that it calls ":100:".
console = Messages(stderr=True, highlight=False, emoji=False, soft_wrap=not sys.stderr.isatty(), quiet=not is_main())
"""stderr, for everything but data; silent in all processes except rank 0."""


@contextmanager
def muted() -> Iterator[None]:
    """Show no messages, such as those that another command gave before; spinners and bars are shown."""
    console.is_muted = True
    try:
        yield
    finally:
        console.is_muted = False


@contextmanager
def spinner(text: str) -> Iterator[None]:
    """Show a spinner while something short runs.

    What is typed meanwhile is not shown, which would break its line, and is read by the next question.
    """
    _Notice.spinners += 1
    try:
        with without_echo(), console.status(text, refresh_per_second=4):
            yield
    finally:
        _Notice.spinners -= 1


@contextmanager
def working(text: str) -> Iterator[None]:
    """Show a spinner on a terminal while something without a bar may take seconds, unless something is shown already.

    Args:
        text: what is being done.
    """
    # Other ranks show nothing, and all share the terminal: rank 1 must not take for its own state what rank 0 set.
    if not (is_main() and interactive()) or _Notice.bars or _Notice.spinners:
        yield
        return
    with spinner(text):
        yield


class _Notice:
    """A line under the bars on the screen, how many of them there are, and how many spinners."""

    texts: tuple[Callable[[], str], ...] = ()
    bars = 0
    spinners = 0


def show_under_bar(text: Callable[[], str]) -> bool:
    """Show a line under the bar on the screen, until the bar ends; return False if there is no bar.

    The text is asked for whenever the bar is drawn, so that a time in it does not contradict that of the bar.
    What a signal handler writes to the terminal itself would move the cursor, and the bar would be drawn twice.
    """
    _Notice.texts = (text,) if _Notice.bars else ()
    return _Notice.bars > 0


_ECHO = 4
"""Columns at the right of a bar for what a terminal shows of Ctrl-C, twice: beyond the line it would begin another."""


def bar_of_tasks(console: Console) -> Progress:
    """Return a bar for tasks of `rlhf_cli.progress`, each of which is the field `owner` of its line."""
    from rich.constrain import Constrain
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn  # slow to import; only terminals need it
    from rich.table import Column
    from rich.text import Text

    class TimeColumn(ProgressColumn):
        """Time so far or left, as `owner` says."""

        def render(self, task: RichTask) -> Text:
            return Text(task.fields["owner"].time_text(), style="progress.remaining")

    class EndText:
        """As much of a `BarText` as there is room for."""

        def __init__(self, text: BarText) -> None:
            self._text = text

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            fitted = self._text.fitted(options.max_width)
            yield Text(fitted, style="dim", no_wrap=True, overflow="ellipsis")

    class EndColumn(ProgressColumn):
        """What is done and was measured, as `owner` says."""

        def render(self, task: RichTask) -> EndText:
            return EndText(task.fields["owner"].text())

    class Bar(Progress):
        """Leaves columns free at the right, and shows `_Notice.texts` below."""

        def get_renderables(self) -> Iterable[RenderableType]:
            width = max(console.width - _ECHO, 1)
            yield from (Constrain(one, width) for one in super().get_renderables())
            yield from (Constrain(Text(text(), style="yellow"), width) for text in _Notice.texts)

        def start(self) -> None:
            super().start()
            _Notice.bars += 1

        def stop(self) -> None:
            try:
                super().stop()
            finally:
                _Notice.bars -= 1
                _Notice.texts = _Notice.texts if _Notice.bars else ()

    def column() -> Column:
        return Column(no_wrap=True)

    columns = (
        TextColumn("{task.description}", table_column=column()),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[count]}", style="progress.download", table_column=column()),
        TextColumn("{task.fields[rate]}", table_column=column()),
        TimeColumn(table_column=column()),
        EndColumn(table_column=Column(no_wrap=True, ratio=1)),
    )
    return Bar(*columns, console=console, transient=False, expand=True)
