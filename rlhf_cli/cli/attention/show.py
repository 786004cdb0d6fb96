"""`rlhf attention show`: visualize the attention weights of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def show(
    model: Annotated[str, typer.Option(metavar="PATH", help="Any Hugging Face model: folder or hub id.")],
    text: Annotated[str, typer.Option(metavar="TEXT", help="Input text of the model.")],
    decoder_text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Input text of the decoder of an encoder-decoder model. Default: the value of --text."
        ),
    ] = None,
    layer: Annotated[int | None, typer.Option(metavar="N", min=0, help="Show only this layer, from 0.")] = None,
    head: Annotated[int | None, typer.Option(metavar="N", min=0, help="Show only this head, from 0.")] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Output folder for attention.png and attention.html.")
    ] = Path("attention"),
) -> None:
    """Draw the attention weights of a model over a text.

    Writes an image and an HTML page.
    """
    from rlhf_cli.attention.weights import collect_weights
    from rlhf_cli.attention.weights_view import write_files
    from rlhf_cli.errors import UsageError
    from rlhf_cli.models.device import resolve_device
    from rlhf_cli.models.libraries import quiet_libraries
    from rlhf_cli.models.loading import ModelSource, load_any, load_tokenizer
    from rlhf_cli.plotting import pyplot

    pyplot()  # fail before loading the model if matplotlib is missing
    if out.exists() and not out.is_dir():
        raise UsageError(f"`--out` must be a folder, but {out} is a file", hint="use another folder for `--out`")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot create the folder {out}: {error.strerror}", hint="use another folder for `--out`"
        ) from error
    quiet_libraries()
    loaded = load_any(model, resolve_device("auto"))
    tokenizer = load_tokenizer(ModelSource(model))
    name = Path(model).resolve().name if Path(model).is_dir() else model
    weights = collect_weights(loaded, tokenizer, text, name=name, decoder_text=decoder_text, layer=layer, head=head)
    for path in write_files(weights, out, head=head):
        typer.echo(path)
