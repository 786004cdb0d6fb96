"""`rlhf watch` in the terminal: progress, curves, health and completions, redrawn while the run goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf_cli.progress import printable
from rlhf_cli.training.monitoring.health.report import excerpt
from rlhf_cli.training.monitoring.panels import PANELS, Panel, Trace, trace
from rlhf_cli.watch.state import Completions, LiveRun, RunningTask, read_live

EVERY = 2.0
"""Seconds between two looks at the files."""
_TWO_COLUMNS = 100
"""Columns of a terminal from which two charts stand side by side."""
_CHART, _LOWEST_CHART = 9, 5
"""Lines of a chart's area: where there is space, and at least."""
_FRAME = 4
"""Lines of a chart around its area: title, two borders, labels."""
_GAP = 3
_FINDINGS, _PROMPTS = 3, 2


def watch(folder: Path, console: Console) -> LiveRun:
    """Show a run until nothing works on it any more, and leave its last state on the terminal.

    Args:
        folder: run directory.
        console: the terminal.

    Raises:
        UsageError: the folder cannot be a run directory.
    """
    run = read_live(folder)
    if run.is_running:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while run.is_running:
                live.update(picture(run, console.width, console.height), refresh=True)
                time.sleep(EVERY)
                run = read_live(folder)
    console.print(picture(run, console.width))
    return run


def picture(run: LiveRun, width: int, height: int | None = None) -> RenderableType:
    """Return one picture of a run.

    Args:
        run: its state.
        width: columns.
        height: lines that it may take, in which charts are lower and fewer; None is without a limit.
    """
    head: list[RenderableType] = [
        Text.assemble((printable(str(run.folder)), "bold"), f": {run.summary}"),
        *(_progress(task, width) for task in run.tasks),
    ]
    foot = [*_findings(run), *_completions(run.completions)]
    free = None if height is None else height - _lines([*head, *foot], width) - 1
    return Group(*head, *_charts(run, width, free), *foot)


def _lines(parts: Sequence[RenderableType], width: int) -> int:
    console = Console(width=width)
    return sum(len(console.render_lines(part)) for part in parts)


def _progress(task: RunningTask, width: int) -> RenderableType:
    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_column(no_wrap=True, min_width=min(len(task.label), width // 3))
    line.add_column(no_wrap=True, min_width=width // 8)
    line.add_column(no_wrap=True, overflow="ellipsis")
    bar = ProgressBar(total=max(task.total, 1), completed=task.done, width=width // 8)
    line.add_row(Text(task.label), bar, Text(task.text))
    return line


def _charts(run: LiveRun, width: int, free: int | None) -> list[RenderableType]:
    """Return the curves of the stage, as many as fit into the free lines."""
    traces = [
        (panel, found) for panel in PANELS.get(run.stage or "", ()) if (found := trace(run.rows, panel)) is not None
    ]
    columns = 2 if width >= _TWO_COLUMNS else 1
    column = (width - _GAP * (columns - 1)) // columns
    lines = _CHART
    if free is not None:
        most = max(1, free // (_LOWEST_CHART + _FRAME))
        traces = traces[: most * columns]
        rows = -(-len(traces) // columns) or 1
        lines = max(_LOWEST_CHART, min(_CHART, free // rows - _FRAME))
    grid = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
    for _ in range(columns):
        grid.add_column(width=column)
    for first in range(0, len(traces), columns):
        grid.add_row(*(_chart(panel, found, column, lines) for panel, found in traces[first : first + columns]))
    return [grid] if traces else []


def _chart(panel: Panel, found: Trace, width: int, height: int) -> RenderableType:
    held_out = f", held out {found.held_out[-1][1]:.3g}" if found.held_out else ""
    title = Text.assemble((panel.title, "bold"), f" ({panel.unit}): {found.caption}{held_out}")
    title.truncate(width, overflow="ellipsis")
    if len(found.smooth) < 2:
        return title
    from uniplot import plot_to_string

    steps, values = zip(*found.smooth, strict=True)
    low, high = _range(values)
    drawn = plot_to_string(
        xs=[list(steps)],
        ys=[list(values)],
        lines=True,
        width=width,
        height=height,
        y_min=low,
        y_max=high,
        line_length_hard_cap=width,
        character_set="braille",
        color=False,
        y_gridlines=[],
        x_gridlines=[],
    )
    return Group(title, *(Text(line, no_wrap=True, overflow="crop") for line in drawn.rstrip("\n").split("\n")))


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the vertical axis: a curve that hardly changes does not fill it."""
    low, high = min(values), max(values)
    least = max(0.02 * max(abs(low), abs(high)), 1e-6)
    return (low, high) if high - low >= least else (low - least, high + least)


def _findings(run: LiveRun) -> list[RenderableType]:
    if not run.rows:
        return []
    if not run.findings:
        return [Text("health: nothing stands out")]
    shown = [Text(f"health: {one.severity}, {one.subject}: {one.seen}") for one in run.findings[:_FINDINGS]]
    more = len(run.findings) - len(shown)
    return [*shown, *([Text(f"health: {more:,} more, see `rlhf diagnose {run.folder}`")] if more else [])]


def _completions(found: Sequence[Completions]) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for one in found[:_PROMPTS]:
        parts.append(Text(excerpt(one.prompt, 200), style="cyan", no_wrap=True, overflow="ellipsis"))
        sides = [(one.last_step, one.last)]
        if one.first_step < one.last_step:
            sides.insert(0, (one.first_step, one.first))
        for step, completion in sides:
            text = f"{'before training' if step == 0 else f'step {step:,}'}: {excerpt(completion, 240)}"
            parts.append(Padding(Text(text), (0, 0, 0, 2)))
    return parts
