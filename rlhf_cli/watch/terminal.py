"""`rlhf watch` in the terminal: progress, curves, health and completions, redrawn while the run goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf_cli.plain_text import printable
from rlhf_cli.quoting import word
from rlhf_cli.training.monitoring.health.report import excerpt
from rlhf_cli.training.monitoring.panels import PANELS, Panel, Trace, thinned, trace
from rlhf_cli.watch.state import Completions, LiveRun, RunningTask, Watcher

EVERY = 2.0
"""Seconds between two pictures, at least."""
_IDLE = 5
"""Seconds of rest per second of drawing: the run needs the processor more."""
_TWO_COLUMNS = 100
"""Columns of a terminal from which two charts stand side by side."""
_CHART, _LOWEST_CHART = 9, 5
"""Lines of a chart's area: where there is space, and at least."""
_FRAME = 4
"""Lines of a chart around its area: title, two borders, labels."""
_GAP = 3
_FINDINGS, _PROMPTS = 3, 2
_LEAVE = Text("Ctrl-C ends watching, not the run", style="dim")


def watch(folder: Path, console: Console) -> LiveRun:
    """Show a run until no process works on it any more, and leave its last state on the terminal.

    Args:
        folder: run directory.
        console: the terminal.

    Raises:
        UsageError: the folder cannot be a run directory.
    """
    watcher = Watcher(folder)
    run = watcher.look()
    if run.is_running:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while run.is_running:
                began = time.monotonic()
                live.update(Group(picture(run, console.width, console.height - 1), _LEAVE), refresh=True)
                spent = time.monotonic() - began
                time.sleep(max(EVERY, _IDLE * spent))
                run = watcher.look()
    console.print(picture(run, console.width, console.height))
    return run


def picture(run: LiveRun, width: int, height: int | None = None) -> RenderableType:
    """Return one picture of a run.

    Args:
        run: its state.
        width: columns.
        height: lines that it may take: first what is running, then a chart, findings and completions, then more
            charts; None is without a limit.
    """
    folder = printable(str(run.folder))
    head: list[RenderableType] = [
        Text.assemble((folder, "bold"), f": {run.summary}"),
        *(_progress(task, width) for task in run.tasks),
        *(Text(f"evaluate: {metric}: {value}") for metric, value in run.results),
    ]
    found = [(panel, trace(run.rows, panel)) for panel in PANELS.get(run.stage or "", ())]
    traces = [(panel, one) for panel, one in found if one is not None]
    foot = [*_findings(run, folder), *_completions(run.completions)]
    if height is None:
        return Group(*head, *_charts(traces, width, None), *foot)
    free = height - _lines(head, width) - 1
    least = _LOWEST_CHART + _FRAME if traces else 0
    kept: list[RenderableType] = []
    for part in foot:
        if _lines([*kept, part], width) > free - (least if free >= least else 0):
            break
        kept.append(part)
    free -= _lines(kept, width)
    return Group(*head, *(_charts(traces, width, free) if free >= least else ()), *kept)


def _lines(parts: Sequence[RenderableType], width: int) -> int:
    console = Console(width=width, emoji=False)
    return sum(len(console.render_lines(part)) for part in parts)


def _progress(task: RunningTask, width: int) -> RenderableType:
    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_column(no_wrap=True, min_width=min(len(task.label), width // 3))
    line.add_column(no_wrap=True, min_width=width // 8)
    line.add_column(no_wrap=True, overflow="ellipsis")
    bar = ProgressBar(total=max(task.total, 1), completed=task.done, width=width // 8)
    line.add_row(Text(task.label), bar, Text(task.text))
    return line


def _charts(traces: Sequence[tuple[Panel, Trace]], width: int, free: int | None) -> list[RenderableType]:
    """Return the curves of the stage, as many as fit into the free lines."""
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

    points = thinned(found.smooth, 2 * width)
    steps, values = zip(*points, strict=True)
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


def _findings(run: LiveRun, folder: str) -> list[RenderableType]:
    if not run.rows:
        return []
    if not run.findings:
        return [Text("health: nothing stands out")]
    shown = [Text(f"health: {one.severity}, {one.subject}: {one.seen}") for one in run.findings[:_FINDINGS]]
    more = len(run.findings) - len(shown)
    return [*shown, *([Text(f"health: {more:,} more, see `rlhf diagnose {word(folder)}`")] if more else [])]


def _completions(found: Sequence[Completions]) -> list[RenderableType]:
    """Return each prompt with its first and its newest completion."""
    return [Group(*_of_prompt(one)) for one in found[:_PROMPTS]]


def _of_prompt(one: Completions) -> Iterator[RenderableType]:
    yield Text(excerpt(one.prompt, 200), style="cyan", no_wrap=True, overflow="ellipsis")
    sides = [(one.last_step, one.last)]
    if one.first_step < one.last_step:
        sides.insert(0, (one.first_step, one.first))
    for step, completion in sides:
        text = f"{'before training' if step == 0 else f'step {step:,}'}: {excerpt(completion, 240)}"
        yield Padding(Text(text), (0, 0, 0, 2))
