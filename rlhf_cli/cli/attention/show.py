"""`rlhf attention show`: what heads look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def show(
    model: Annotated[str, typer.Option(metavar="PATH", help="A model of any kind: folder or hub id.")],
    text: Annotated[str, typer.Option(metavar="TEXT", help="What it reads.")],
    answer: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="What the decoder of an encoder-decoder model reads. Default: the text once more."
        ),
    ] = None,
    layer: Annotated[int | None, typer.Option(metavar="N", min=0, help="Only this layer, counted from 0.")] = None,
    head: Annotated[int | None, typer.Option(metavar="N", min=0, help="Only this head, counted from 0.")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for attention.png and attention.html.")] = Path(
        "attention"
    ),
) -> None:
    """Draw the attention weights of a model's heads over a text, as a picture and as a page."""
    from rlhf_cli.attention import weights_view as work
    from rlhf_cli.attention.plots import pyplot
    from rlhf_cli.errors import UsageError
    from rlhf_cli.models.loading import ModelSource, load_any, load_tokenizer, quiet_libraries, resolve_device

    pyplot()  # say now, not after the loading, that it is missing
    if out.exists() and not out.is_dir():
        raise UsageError(f"cannot write to {out}: it is a file, and the folder for two files is wanted")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {out}: {error.strerror}", hint="name another with `--out`") from error
    quiet_libraries()
    loaded = load_any(model, resolve_device("auto"))
    tokenizer = load_tokenizer(ModelSource(model))
    name = Path(model).resolve().name if Path(model).is_dir() else model
    seen = work.look(loaded, tokenizer, text, name=name, answer=answer, layer=layer, head=head)
    for path in work.write(seen, out, head=head):
        typer.echo(path)
