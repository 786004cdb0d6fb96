"""`rlhf doctor`: what this machine offers."""

from __future__ import annotations

import json

import typer

from rlhf_cli.cli.options import Json


def doctor(as_json: Json = False) -> None:
    """Say what this machine offers: versions, devices, precision, memory, disk."""
    from rlhf_cli.cli.hardware import examine, print_report

    found = examine()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_report(found)
