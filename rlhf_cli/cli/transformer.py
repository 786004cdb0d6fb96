"""`rlhf transformer`: GPT-2 and Llama checkpoints as explicit transformers, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

app = typer.Typer(
    rich_markup_mode=None, help="Convert models to the explicit transformer, and back.", no_args_is_help=True
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a language model.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not be there yet.")]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Commit, tag or branch on the hub.")]

_TOLERANCE = 1e-3
"""How far logits may move in a conversion, as a share of the largest: rounding stays far below, a mistake far above."""


@app.command()
def convert(model: Model, out: Out, revision: Revision = None) -> None:
    """Write a GPT-2 or Llama model (SmolLM2, ...) as an explicit transformer: same weights, same logits."""
    from rlhf_cli.transformer.conversion import as_explicit

    _convert(model, out, revision, as_explicit)


@app.command()
def export(model: Model, out: Out, revision: Revision = None) -> None:
    """Write an explicit transformer as the GPT-2 or Llama it is, for programs that know only those."""
    from rlhf_cli.transformer.conversion import as_transformers

    _convert(model, out, revision, as_transformers)


def _convert(path: str, out: Path, revision: str | None, change: Callable[..., PreTrainedModel]) -> None:
    """Load, convert, compare logits in float32, write in the precision that the weights had."""
    import torch

    from rlhf_cli.errors import ModelError, UsageError
    from rlhf_cli.models.loading import ModelSource, context_length, load_config, load_policy, load_tokenizer
    from rlhf_cli.models.saving import save_model_folder
    from rlhf_cli.progress import say

    if out.exists():
        raise UsageError(f"{out} is there already", hint="choose a new folder; nothing is overwritten")
    source = ModelSource(path, revision, attention="sdpa")
    stored = load_config(source).dtype
    model, tokenizer = load_policy(source), load_tokenizer(source)
    changed = change(model, path)
    ids = torch.arange(min(16, model.config.vocab_size, context_length(model.config))).unsqueeze(0)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        apart = float((expected - changed(input_ids=ids).logits).abs().max())
    if not apart <= _TOLERANCE * float(expected.abs().max()):  # so written, NaN is refused too
        raise ModelError(
            f"`{path}` computes other logits once it is converted: they differ by {apart:.1e}; nothing is written",
            hint="use the model as it is; only models that compute the same can be converted",
        )
    kinds = f"{type(model).__name__} -> {type(changed).__name__}"
    save_model_folder(changed, tokenizer, out, dtype=stored if isinstance(stored, torch.dtype) else torch.float32)
    say(f"{kinds}: logits of {ids.shape[1]} tokens differ by at most {apart:.1e} in float32")
    typer.echo(out)
