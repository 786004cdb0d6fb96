"""`rlhf attention verify`: check that attention backends do not change results."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_cli.cli.options import Json

if TYPE_CHECKING:
    from rlhf_cli.attention.verify import Verdict

_Models = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="PATH", help="Folder or hub id; repeatable. Default: a tiny model per family."),
]
_Backends = Annotated[
    list[str] | None,
    typer.Option("--attention", metavar="NAME", help="Backend to verify; repeatable. Default: all that are available."),
]
_Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")]


def verify(models: _Models = None, backends: _Backends = None, device: _Device = "auto", as_json: Json = False) -> None:
    """Check that attention backends do not change results.

    Hidden states and gradients are compared on every batch layout. The reference is each sequence on its own under
    transformers' eager attention. The exit code is 1 if any difference exceeds rounding.
    """
    from rlhf_cli.attention import verify as engine

    verdicts = _verdicts(models, backends or engine.available_backends(), device)
    if as_json:
        typer.echo(json.dumps(engine.as_json(verdicts), indent=2))
    else:
        typer.echo(engine.as_table(verdicts))
    if not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(1)


def _verdicts(models: list[str] | None, backends: list[str], device: str) -> list[Verdict]:
    from rlhf_cli.attention import model_zoo, parity, registry
    from rlhf_cli.attention import verify as engine
    from rlhf_cli.models.device import resolve_device
    from rlhf_cli.models.libraries import quiet_libraries
    from rlhf_cli.models.loading import load_any
    from rlhf_cli.progress import task

    quiet_libraries()
    for name in backends:
        if name != registry.AUTO:
            registry.find(name)
    where = resolve_device(device)
    if not models:
        with task("verifying attention", len(model_zoo.SUPPORTED) * len(backends), "models") as bar:
            return engine.verify_model_zoo(backends, device=where, on_progress=lambda done: bar.advance(note=done))
    verdicts = []
    for path in models:
        model = load_any(path, where)
        sequences = parity.ProbeSequences.random(
            model.config.get_text_config(decoder=True).vocab_size, prefix_length=24, suffix_lengths=(40, 1, 13)
        )
        with task(f"verifying {path}", len(backends), "backends") as bar:
            verdicts += engine.verify_model(
                path, model, backends, sequences=sequences, on_progress=lambda done, bar=bar: bar.advance(note=done)
            )
    return verdicts
