"""`rlhf reproduce`: run a run again and compare the hashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rlhf_cli.cli.options import Json, RunArgument


def reproduce(
    run: RunArgument,
    run_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory of the repetition; default: RUN-again.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Repeat RUN from its recorded recipe, in RUN-again or `--run-dir`, and compare the hashes of all stages.

    The exit code is 1 if a hash differs.
    """
    from rlhf_cli.pipeline.reproduce import check_equal
    from rlhf_cli.pipeline.reproduce import reproduce as run_again

    again = run_dir or run.with_name(f"{run.resolve().name}-again")
    found = run_again(run, again)
    if as_json:
        typer.echo(
            json.dumps({one.stage: {"before": one.before, "after": one.after, "equal": one.is_equal} for one in found})
        )
    else:
        for one in found:
            typer.echo(f"{one.stage:<10} {'equal' if one.is_equal else 'DIFFERS'}  {one.after[:16]}")
    check_equal(found)
