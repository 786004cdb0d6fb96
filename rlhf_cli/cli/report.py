"""`rlhf report`: one HTML file about a run, or about several that are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rlhf_cli.cli.completion import run_directories
from rlhf_cli.cli.options import Json


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run directories; several are compared.", autocompletion=run_directories),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="HTML file; default: report.html in RUN, or for several comparison.html beside RUN.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML file: did it work, how certain is that, curves, completions side by side, how to repeat it.

    The file is self-contained. A JSON file with the same figures is written beside it, and every chart as a PNG file,
    if matplotlib is installed.
    """
    from rlhf_cli.progress import say
    from rlhf_cli.report.build import REPORT, write_charts, write_report

    where = output or (runs[0] / REPORT if len(runs) == 1 else runs[0].parent / "comparison.html")
    found = write_report(runs, where)
    charts = write_charts(found)
    say(f"{found.page.verdict.headline}: {found.page.verdict.reason}")
    if charts is not None:
        say(f"charts as PNG files: {charts}")
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "html": str(found.html),
                    "json": str(found.plain),
                    "charts": charts and str(charts),
                    "verdict": found.page.verdict.headline,
                }
            )
        )
    else:
        typer.echo(found.html)
