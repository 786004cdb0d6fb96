"""`rlhf watch`: what a run is doing, from its files."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from typing import Annotated

import typer

from rlhf_cli.cli.options import RunArgument

_WIDTH = 100
"""Columns where stdout is not a terminal."""

Serve = Annotated[
    bool, typer.Option("--serve", help="Show the run in a browser: start a web server and print its address.")
]
Once = Annotated[bool, typer.Option("--once", help="Print the state of the run once and exit.")]
Host = Annotated[
    str | None,
    typer.Option("--host", metavar="ADDRESS", help="With --serve: address to listen on.  [default: 127.0.0.1]"),
]
Port = Annotated[
    int | None,
    typer.Option("--port", metavar="N", min=0, max=65_535, help="With --serve: 0 picks a free port.  [default: 8200]"),
]
_HOST, _PORT = "127.0.0.1", 8200


def watch(run: RunArgument, serve: Serve = False, once: Once = False, host: Host = None, port: Port = None) -> None:
    """Follow a run live: progress, time left, curves, health, completions of fixed prompts.

    It only reads the files of the run, so the run may belong to another process or be a copy from another machine.
    Ctrl-C ends watching, not the run.
    """
    from rlhf_cli.errors import UsageError

    folder = run.expanduser()
    options = (("--host", host), ("--port", port))
    if given := [name for name, value in options if value is not None and not serve]:
        raise UsageError(f"`{given[0]}` has no effect without `--serve`", hint=f"add `--serve`, or remove `{given[0]}`")
    if serve:
        if once:
            raise UsageError("`--once` has no effect with `--serve`", hint="use one of them")
        host, port = host or _HOST, _PORT if port is None else port
        from rlhf_cli.progress import say, warn
        from rlhf_cli.watch import page
        from rlhf_cli.web.security import is_loopback

        if not is_loopback(host):
            warn(f"listening on {host}: everyone on that network can read the prompts and completions of this run")

        def announce(link: str) -> None:
            say(f"{link} shows {folder}; Ctrl-C stops the server", always=True)

        signum = page.serve(folder, host=host, port=port, announce=announce)
        if signum not in (None, signal.SIGINT):
            raise typer.Exit(128 + signum)
        return
    from rich.console import Console

    from rlhf_cli.watch import terminal
    from rlhf_cli.watch.state import read_live

    is_terminal = sys.stdout.isatty()
    console = Console(highlight=False, emoji=False, width=None if is_terminal else _WIDTH)
    if once or not is_terminal:
        console.print(terminal.picture(read_live(folder), console.width))
        return
    with suppress(KeyboardInterrupt):  # the way to leave it
        terminal.watch(folder, console)
