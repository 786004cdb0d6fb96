"""`rlhf transformer`: convert GPT-2 and Llama models to the explicit transformer and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

app = typer.Typer(
    rich_markup_mode=None, help="Convert models to the explicit transformer and back.", no_args_is_help=True
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a language model.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Output folder; must not exist.")]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Commit, tag or branch on the hub.")]

_TOLERANCE = 1e-3
"""Largest difference of logits after conversion, relative to the largest logit. Rounding stays far below it."""


@app.command()
def convert(model: Model, out: Out, revision: Revision = None) -> None:
    """Convert a GPT-2 or Llama model (SmolLM2, ...) to an explicit transformer with the same weights and logits."""
    from rlhf_cli.transformer.conversion import as_explicit

    _convert(model, out, revision, as_explicit)


@app.command()
def export(model: Model, out: Out, revision: Revision = None) -> None:
    """Convert an explicit transformer to a GPT-2 or Llama model that other programs can load."""
    from rlhf_cli.transformer.conversion import as_transformers

    _convert(model, out, revision, as_transformers)


def _convert(path: str, out: Path, revision: str | None, change: Callable[..., PreTrainedModel]) -> None:
    """Load and convert a model, compare logits in float32, and save it in the precision of the original weights."""
    import torch

    from rlhf_cli.errors import ModelError, UsageError
    from rlhf_cli.models.loading import ModelSource, context_length, load_config, load_policy, load_tokenizer
    from rlhf_cli.models.saving import save_model_folder
    from rlhf_cli.progress import say

    if out.exists():
        raise UsageError(f"{out} already exists", hint="use a new folder; nothing is overwritten")
    source = ModelSource(path, revision, attention="sdpa")
    stored = load_config(source).dtype
    model, tokenizer = load_policy(source), load_tokenizer(source)
    changed = change(model, path)
    ids = torch.arange(min(16, model.config.vocab_size, context_length(model.config))).unsqueeze(0)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        difference = float((expected - changed(input_ids=ids).logits).abs().max())
    if not difference <= _TOLERANCE * float(expected.abs().max()):  # refuses NaN too
        raise ModelError(
            f"`{path}` computes different logits after conversion (difference {difference:.1e}); nothing was written",
            hint="use the model without conversion",
        )
    conversion = f"{type(model).__name__} -> {type(changed).__name__}"
    save_model_folder(changed, tokenizer, out, dtype=stored if isinstance(stored, torch.dtype) else torch.float32)
    say(f"{conversion}: logits of {ids.shape[1]} tokens differ by at most {difference:.1e} in float32")
    typer.echo(out)
