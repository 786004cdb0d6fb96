"""`rlhf label stats`: measure the quality of labels and say what to do about it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_cli.cli.completion import run_directories
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
            help="Run directory, label store (*.sqlite), labels.jsonl, or rankings with `annotator`.",
            autocompletion=run_directories,
        ),
    ],
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a plot: .png, .svg or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Measure how far annotators agree with one another and with themselves, and their biases; say what to fix."""
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
    """Raise before the work begins if no plot can be written."""
    from rlhf_cli.errors import UsageError
    from rlhf_cli.plotting import pyplot

    pyplot()
    if plot.suffix not in _PICTURES:
        raise UsageError(f"`--plot {plot}`: the file name must end in {', '.join(_PICTURES)}")
    if not plot.parent.is_dir():
        raise UsageError(f"cannot write a plot to {plot}: {plot.parent} is not a folder")


def _show(report: LabelReport) -> None:
    from rich.console import Console

    from rlhf_cli.labeling.statistics.text_report import report_text

    console = Console(highlight=False, markup=False, emoji=False)
    if sys.stdout.isatty():
        console.print(report_text(report))
        return
    with console.capture() as capture:
        console.print(report_text(report))
    # Tables pad their lines with spaces, which are useless in a file.
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
