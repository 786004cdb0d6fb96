"""The last thing people see: what ran, how long, the figures that matter, and where everything is. On stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cli.progress import console, format_duration, interactive, say

if TYPE_CHECKING:
    from rlhf_cli.pipeline.runner import RunResult, StageResult

_STATUS = {"done": "ran", "cached": "up to date"}


def show_plan(result: RunResult) -> None:
    """What a run would do, one line a stage."""
    width = max(len(row.name) for row in result.stages)
    for row in result.stages:
        status = "up to date" if row.status == "cached" else row.status
        why = "" if row.status == "cached" else f": {row.reason}"
        say(f"{row.name:<{width}}  {status}{why}")
    say(f"in {result.run_dir}")


def show_outcome(result: RunResult) -> None:
    """The closing table; plain lines where nobody watches."""
    if interactive():
        _table(result)
    else:
        _lines(result)
    if all(row.status == "cached" for row in result.stages):
        say("nothing to do: everything is up to date")


def _table(result: RunResult) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("stage", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("key figures", overflow="fold")
    for row in result.stages:
        style = "green" if row.status == "done" else "dim"
        figures = "\n".join(f"{what}  {figure}" for what, figure in row.summary)
        status = f"[{style}]{_STATUS.get(row.status, row.status)}[/{style}]"
        table.add_row(row.name, status, _seconds(row), escape(figures))
    console.print()
    console.print(table)
    say(f"in {result.run_dir}/, a folder a stage")


def _lines(result: RunResult) -> None:
    for row in result.stages:
        figures = "; ".join(f"{what} {figure}" for what, figure in row.summary)
        parts = [f"{row.name}: {_STATUS.get(row.status, row.status)}", _took(row), figures, str(row.path)]
        say("  ".join(part for part in parts if part))


def _took(row: StageResult) -> str:
    return f"({_seconds(row)})" if row.status == "done" else ""


def _seconds(row: StageResult) -> str:
    return "" if row.seconds is None else format_duration(row.seconds)
