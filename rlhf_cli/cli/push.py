"""`rlhf push`: upload a model of a run to the Hugging Face hub."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from rlhf_cli.cli.completion import models
from rlhf_cli.cli.options import Json

_CARD_LINES = 12

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="RUN/STAGE, such as runs/mine/ppo, or a model folder.", autocompletion=models),
]


def push(
    model: Model,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch to upload to; created if it does not exist.")
    ] = None,
    commit_message: Annotated[str | None, typer.Option(metavar="TEXT", help="Commit message.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded; send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a model to the Hugging Face hub: model card, weights, adapter and tokenizer, as one commit.

    Nothing else of a run is uploaded: no checkpoints, labels, prompts, samples or metrics. The token of
    `hf auth login` or HF_TOKEN is used; it needs write permission. The address of the commit is printed.
    """
    from rlhf_cli.export.models import find_model
    from rlhf_cli.export.push import plan_upload, upload
    from rlhf_cli.pipeline.disk_space import format_bytes
    from rlhf_cli.progress import say, warn

    plan = plan_upload(find_model(model), repo, is_private=private, revision=revision, message=commit_message)
    if plan.card is None:
        warn(f"{plan.folder} has no model card; `rlhf report RUN` writes one for each model of a run")
    if not dry_run:
        say(f"uploading {len(plan.files):,} files, {format_bytes(sum(plan.files.values()))}, to {repo}")
    address = None if dry_run else upload(plan)
    visibility = "private" if private else "the default of its owner (public, unless set otherwise)"
    if as_json:
        plain = {"repo": repo, "private": private, "revision": revision, "files": plan.files, "url": address}
        typer.echo(json.dumps(plain))
        return
    if address is not None:
        typer.echo(address)
        return
    say("nothing was sent: --dry-run")
    typer.echo(f"repository  {repo}\nif new      {visibility}")
    typer.echo(f"branch      {revision or 'main'}\ncommit      {plan.message}\n")
    width = max(map(len, plan.files))
    typer.echo("\n".join(f"{name:{width}}  {format_bytes(size):>9}" for name, size in plan.files.items()))
    typer.echo(f"{'in all':{width}}  {format_bytes(sum(plan.files.values())):>9}")
    if plan.card is not None:
        typer.echo("\nREADME.md begins:")
        typer.echo("".join(f"  {line}\n" for line in plan.card.splitlines()[:_CARD_LINES]), nl=False)
