"""`rlhf label stats`: how far labels can be trusted, and what to do about it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_cli.cli.options import Json

if TYPE_CHECKING:
    from rlhf_cli.labeling.statistics.report import LabelReport

_SEED = 0
_PICTURES = (".png", ".svg", ".pdf")


def stats(
    where: Annotated[
        Path,
        typer.Argument(
            metavar="WHERE",
            help="A run directory, a label store (*.sqlite), labels.jsonl, or rankings with `annotator`.",
        ),
    ],
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a plot too: .png, .svg or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Say how far labelers agree, with others and themselves, what sways them, and what to act on."""
    from rlhf_cli.labeling.statistics.source import labels_to_count
    from rlhf_cli.labeling.statistics.summary import statistics
    from rlhf_cli.progress import warn

    if plot is not None:
        _check_plot(plot)
    labels, warnings = labels_to_count(where)
    for warning in warnings:
        warn(warning)
    report = statistics(labels, seed=_SEED)
    if as_json:
        typer.echo(json.dumps(report.to_json(), ensure_ascii=False, allow_nan=False))
    else:
        _show(report)
    if plot is not None:
        _draw(report, plot, where)


def _check_plot(plot: Path) -> None:
    """Say now, not after the work, that no plot can be written."""
    from rlhf_cli.errors import UsageError
    from rlhf_cli.plotting import pyplot

    pyplot()
    if plot.suffix not in _PICTURES:
        raise UsageError(f"`--plot {plot}`: a name that ends in {', '.join(_PICTURES)} is expected")
    if not plot.parent.is_dir():
        raise UsageError(f"cannot write a plot to {plot}: {plot.parent} is no folder")


def _show(report: LabelReport) -> None:
    from rich.console import Console

    from rlhf_cli.labeling.statistics.text_report import report_text

    console = Console(highlight=False, markup=False, emoji=False)
    if sys.stdout.isatty():
        console.print(report_text(report))
        return
    with console.capture() as capture:
        console.print(report_text(report))
    # Tables fill their lines with blanks, which only get in the way of whoever reads a file.
    typer.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _draw(report: LabelReport, plot: Path, where: Path) -> None:
    from rlhf_cli.errors import DiskError
    from rlhf_cli.labeling.statistics.plot import draw_report
    from rlhf_cli.progress import say

    try:
        draw_report(report, plot, title=f"labels of {where}")
    except OSError as error:
        raise DiskError(f"cannot write a plot to {plot}: {error.strerror or error}") from error
    say(f"plot in {plot}")
