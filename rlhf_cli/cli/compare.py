"""`rlhf compare`: which of several evaluated runs is better, and how sure that is."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from rlhf_cli.cli.completion import run_directories
from rlhf_cli.cli.options import Json


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Evaluated run directories; those joined by commas form a group.",
            autocompletion=run_directories,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Compare evaluated runs on the prompts they share, with intervals over prompts and over seeds.

    Runs whose settings differ in nothing but the seed form a group. Every other group is compared with the first.
    """
    from rlhf_cli.pipeline.comparison_text import comparison_text
    from rlhf_cli.pipeline.run_comparison import compare_runs

    found = compare_runs(runs)
    typer.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False) if as_json else comparison_text(found))
