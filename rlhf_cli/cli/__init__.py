"""The `rlhf` command: parse, call the pipeline, print. Imports nothing heavy before a command is known."""

from __future__ import annotations

import sys


def main() -> int:
    """Entry point; returns the exit code (see `rlhf_cli.errors`)."""
    from rlhf_cli.cli.environment import debugging, prepare
    from rlhf_cli.cli.failures import report

    prepare()
    try:
        from rlhf_cli.cli.app import app

        code = app(args=sys.argv[1:] or ["--help"], prog_name="rlhf", standalone_mode=False)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if debugging():
            raise
        return report(error)
    if code == 130:  # typer's word for a KeyboardInterrupt, which it says nothing about
        return report(KeyboardInterrupt())
    return code if isinstance(code, int) else 0
