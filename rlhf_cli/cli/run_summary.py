"""Summary at the end of a run, on stderr: status, time and key metrics per stage, and the run directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cli.console import console
from rlhf_cli.durations import format_duration
from rlhf_cli.progress import say, warn
from rlhf_cli.quoting import word

if TYPE_CHECKING:
    from pathlib import Path

    from rlhf_cli.pipeline.runner import RunResult, StageResult

_STATUS = {"done": "ran", "cached": "up to date"}


def show_plan(result: RunResult, remote: str | None) -> None:
    """Print what a run would do, one line per stage; `remote` is the URL of its copy."""
    from rlhf_cli.pipeline.disk_space import format_bytes

    width = max(len(row.name) for row in result.stages)
    for row in result.stages:
        status = "up to date" if row.status == "cached" else row.status
        why = "" if row.status == "cached" else f": {row.reason}"
        needs = None if row.status == "cached" else row.device_bytes
        memory = "" if needs is None else f"; needs up to about {format_bytes(needs)} on a GPU"
        say(f"{row.name:<{width}}  {status}{why}{memory}", always=True)
    say(f"run directory: {result.run_dir}", always=True)
    if remote is not None:
        say(
            f"remote copy: {remote}, which a dry run does not read; a run downloads it if its directory is empty",
            always=True,
        )


def show_outcome(result: RunResult) -> None:
    """Print the summary as a table."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("stage", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("metrics", overflow="fold")
    for row in result.stages:
        style = "green" if row.status == "done" else "dim"
        metrics = "\n".join(f"{name}  {value}" for name, value in row.summary)
        status = f"[{style}]{_STATUS.get(row.status, row.status)}[/{style}]"
        table.add_row(row.name, status, _seconds(row), escape(metrics))
    console.print()
    console.print(table, soft_wrap=False)  # wrapped in logs too
    for row in result.stages:
        _say_doubts(row, result.run_dir)
    say(f"results are in {result.run_dir}/, one folder per stage")
    if all(row.status == "cached" for row in result.stages):
        say("nothing to do: everything is up to date")


def _say_doubts(row: StageResult, run_dir: Path) -> None:
    """Warn of labels or judgments that put the result in doubt, also where the stage is up to date."""
    from rlhf_cli.labeling.warnings import doubtful_warnings, one_line

    doubts = doubtful_warnings(row.path)
    for one in doubts:
        warn(f"{row.name}: {one_line(one.about)}: {one_line(one.text)}")
    if doubts and row.name == "label":
        say(f"`rlhf label stats {word(run_dir)}` says what to do about these labels")


def _seconds(row: StageResult) -> str:
    from rlhf_cli.training.monitoring.timing_log import whole_seconds

    return "" if row.seconds is None else format_duration(whole_seconds(row.timing, row.seconds))
