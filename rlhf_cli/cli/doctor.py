"""`rlhf doctor`: versions and hardware of this machine, and what to do about problems."""

from __future__ import annotations

import json

import typer

from rlhf_cli.cli.options import Json


def doctor(as_json: Json = False) -> None:
    """Show versions, hardware and problems of this machine, each problem with the command that fixes it.

    The exit code is 1 if a problem stops a normal run.
    """
    from rlhf_cli.cli.hardware import examine, print_report

    found = examine()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_report(found)
    if any(one["blocks"] for one in found["problems"]):
        raise typer.Exit(1)
