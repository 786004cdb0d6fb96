"""stderr for messages: what is printed is also written to the log of the run; `--quiet` hides it."""

from __future__ import annotations

import io
import os
import sys
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.control import Control

from rlhf_cli import run_log
from rlhf_cli.distributed.ranks import is_main
from rlhf_cli.verbosity import is_quiet

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.progress import Task as RichTask


def interactive() -> bool:
    """Whether stderr is a terminal that a person may watch, and neither `--quiet` nor a CI variable is set."""
    return sys.stderr.isatty() and not (is_quiet() or os.environ.get("CI") or os.environ.get("TERM") == "dumb")


class Messages(Console):
    """stderr, and the log of the run beside it."""

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
        if shown and (always or not is_quiet()):
            super().print(*objects, **options)
        if run_log.is_open() and not all(isinstance(one, Control) for one in objects):
            text, merged = io.StringIO(), {"soft_wrap": True, **options}
            plain = Console(file=text, width=self.width, color_system=None, highlight=False, emoji=False)
            plain.print(*objects, **merged)
            run_log.write(text.getvalue())


# rich would write `data.jsonl:100:` with the emoji that it calls ":100:".
console = Messages(stderr=True, highlight=False, emoji=False, soft_wrap=not sys.stderr.isatty(), quiet=not is_main())
"""stderr, for everything but data; silent in all processes except rank 0."""


def bar_of_tasks(console: Console) -> Progress:
    """Return a bar for tasks of `rlhf_cli.progress`, each of which is the field `owner` of its line."""
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn  # slow to import; only terminals need it
    from rich.table import Column
    from rich.text import Text

    class TimeColumn(ProgressColumn):
        """Time so far or left, as `owner` says."""

        def render(self, task: RichTask) -> Text:
            return Text(task.fields["owner"].time_text(), style="progress.remaining")

    def column() -> Column:
        return Column(no_wrap=True)

    columns = (
        TextColumn("{task.description}", table_column=column()),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[count]}", style="progress.download", table_column=column()),
        TextColumn("{task.fields[rate]}", table_column=column()),
        TimeColumn(table_column=column()),
        TextColumn("[dim]{task.fields[note]}", table_column=Column(no_wrap=True, ratio=1)),
    )
    return Progress(*columns, console=console, transient=False, expand=True)
