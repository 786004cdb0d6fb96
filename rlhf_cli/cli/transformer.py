"""`rlhf transformer`: convert GPT-2 and Llama models to the explicit transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a language model.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Output folder; must not exist.")]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Commit, tag or branch on the hub.")]

_TOLERANCE = 1e-3
"""Largest difference of logits after conversion, relative to the largest logit. Rounding stays far below it."""


@app.callback()
def transformer() -> None:
    """Convert GPT-2 and Llama models to the built-in transformer; `rlhf export --to llama` converts back."""


@app.command()
def convert(model: Model, out: Out, revision: Revision = None) -> None:
    """Convert a GPT-2 or Llama model (such as SmolLM2).

    The result is a built-in transformer (docs/transformer.md) with the same weights and logits."""
    import torch

    from rlhf_cli.errors import ModelError, UsageError
    from rlhf_cli.models.loading import ModelSource, context_length, load_config, load_policy, load_tokenizer
    from rlhf_cli.models.saving import save_model_folder
    from rlhf_cli.progress import say
    from rlhf_cli.transformer.conversion import as_explicit

    if out.exists():
        raise UsageError(f"{out} already exists", hint="use a new folder; nothing is overwritten")
    source = ModelSource(model, revision, attention="sdpa")
    stored = load_config(source).dtype
    loaded, tokenizer = load_policy(source), load_tokenizer(source)
    changed = as_explicit(loaded, model)
    ids = torch.arange(min(16, loaded.config.vocab_size, context_length(loaded.config))).unsqueeze(0)
    with torch.no_grad():
        expected = loaded(input_ids=ids).logits
        difference = float((expected - changed(input_ids=ids).logits).abs().max())
    if not difference <= _TOLERANCE * float(expected.abs().max()):  # refuses NaN too
        raise ModelError(
            f"`{model}` computes different logits after conversion (difference {difference:.1e}); nothing was written",
            hint="use the model without conversion",
        )
    conversion = f"{type(loaded).__name__} -> {type(changed).__name__}"
    save_model_folder(changed, tokenizer, out, dtype=stored if isinstance(stored, torch.dtype) else torch.float32)
    say(f"{conversion}: logits of {ids.shape[1]} tokens differ by at most {difference:.1e} in float32")
    typer.echo(out)
