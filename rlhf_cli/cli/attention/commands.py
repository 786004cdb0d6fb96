"""`rlhf attention`: list, verify and benchmark attention backends, and visualize attention weights."""

from __future__ import annotations

import json

import typer

from rlhf_cli.cli.attention import bench as attention_bench
from rlhf_cli.cli.attention import show as attention_show
from rlhf_cli.cli.attention import verify as attention_verify
from rlhf_cli.cli.options import Json

app = typer.Typer(
    rich_markup_mode=None,
    help="List, verify and benchmark attention backends; visualize attention weights.",
    no_args_is_help=True,
)


@app.command("list")
def list_backends(as_json: Json = False) -> None:
    """List attention backends, and what each supports on this machine."""
    from rlhf_cli.attention.capabilities import as_table, list_capabilities

    found = list_capabilities()
    typer.echo(json.dumps(found, indent=2) if as_json else as_table(found))


app.command("verify")(attention_verify.verify)
app.command("bench")(attention_bench.bench)
app.command("show")(attention_show.show)
