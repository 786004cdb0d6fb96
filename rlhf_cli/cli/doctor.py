"""`rlhf doctor`: report versions and hardware of this machine."""

from __future__ import annotations

import json

import typer

from rlhf_cli.cli.options import Json


def doctor(as_json: Json = False) -> None:
    """Report library versions, devices, precision, memory and free disk space of this machine."""
    from rlhf_cli.cli.hardware import examine, print_report

    found = examine()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_report(found)
