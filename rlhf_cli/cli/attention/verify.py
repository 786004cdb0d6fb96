"""`rlhf attention verify`: prove that a backend changes nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_cli.cli.options import Json

if TYPE_CHECKING:
    from rlhf_cli.attention.verify import Verdict

_Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", metavar="PATH", help="A folder or hub id; repeatable. Default: a tiny model of every family."
    ),
]
_Backends = Annotated[
    list[str] | None,
    typer.Option("--attention", metavar="NAME", help="A backend; repeatable. Default: all that run here."),
]
_Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")]


def verify(models: _Models = None, backends: _Backends = None, device: _Device = "auto", as_json: Json = False) -> None:
    """Prove that attention backends change nothing: full, padded, packed, tree and cached, with gradients.

    Each sequence alone under transformers' own eager attention, in float32, is what all are compared with. Exit code 1
    if anything differs by more than rounding explains.
    """
    from rlhf_cli.attention import verify as engine

    verdicts = _verdicts(models, backends or engine.backends_here(), device)
    if as_json:
        typer.echo(json.dumps(engine.as_json(verdicts), indent=2))
    else:
        typer.echo(engine.as_table(verdicts))
    if not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(1)


def _verdicts(models: list[str] | None, backends: list[str], device: str) -> list[Verdict]:
    from rlhf_cli.attention import model_zoo as families
    from rlhf_cli.attention import parity, registry
    from rlhf_cli.attention import verify as engine
    from rlhf_cli.models.loading import load_any, quiet_libraries, resolve_device
    from rlhf_cli.progress import task

    quiet_libraries()
    for name in backends:
        if name != registry.AUTO:
            registry.find(name)
    where = resolve_device(device)
    if not models:
        with task("verifying attention", len(families.FAMILIES) * len(backends), "models") as bar:
            return engine.verify_families(backends, device=where, tell=lambda done: bar.advance(note=done))
    verdicts = []
    for path in models:
        model = load_any(path, where)
        sequences = parity.Sequences.random(
            model.config.get_text_config(decoder=True).vocab_size, shared=24, own=(40, 1, 13)
        )
        with task(f"verifying {path}", len(backends), "backends") as bar:
            verdicts += engine.verify_model(
                path, model, backends, sequences=sequences, tell=lambda done, bar=bar: bar.advance(note=done)
            )
    return verdicts
