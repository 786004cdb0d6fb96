"""Proof that a backend changes nothing: every check of `parity` for models and backends, and the table of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from rlhf_cli.attention import hugging_face, parity, registry
from rlhf_cli.attention import model_zoo as families
from rlhf_cli.errors import ModelError, UsageError


@dataclass(frozen=True)
class Verdict:
    """One check of one model under one backend, or the refusal of a model.

    Attributes:
        model: name of the model.
        backend: name of the backend.
        check: name of the check, see `parity`; "refused" for a model that should be refused and was.
        found: how far it was off; None where it did not run.
        why_not: why it did not run.
        passed: whether it is within `parity.tolerance`, or rightly refused.
    """

    model: str
    backend: str
    check: str
    found: parity.Parity | None
    why_not: str | None
    passed: bool


def backends_here() -> list[str]:
    """Names of the backends that run on this machine."""
    return [name for name, backend in registry.built_in().items() if backend.missing() is None]


def verify_model(
    name: str,
    model: PreTrainedModel,
    backends: Sequence[str],
    *,
    sequences: parity.Sequences,
    tell: Callable[[str], object],
) -> list[Verdict]:
    """All checks of a model under all backends.

    Args:
        name: of the model.
        model: in evaluation mode, on its device.
        backends: names.
        sequences: what it reads.
        tell: called after each backend with what was just checked.
    """
    try:
        parity.require(model, name, hugging_face.implementation(backends[0]))
    except ModelError as error:
        tell(name)
        return [Verdict(name, backend, "refused", None, error.message, False) for backend in backends]
    alone = parity.Alone(model, sequences, with_gradients=True)
    bound = parity.tolerance(model.dtype)
    verdicts = []
    for backend in backends:
        verdicts += [_verdict(name, model, backend, check, alone, bound) for check in parity.checks(model)]
        tell(f"{name}, {backend}")
    return verdicts


def _verdict(
    name: str, model: PreTrainedModel, backend: str, check: str, alone: parity.Alone, bound: parity.Parity
) -> Verdict:
    try:
        found = parity.parity(model, check, alone, hugging_face.implementation(backend))
    except UsageError as error:
        return Verdict(name, backend, check, None, error.message, False)
    is_close = found.forward <= bound.forward
    if found.gradient is not None and bound.gradient is not None:
        is_close = is_close and found.gradient <= bound.gradient
    return Verdict(name, backend, check, found, None, is_close)


def verify_families(backends: Sequence[str], *, device: torch.device, tell: Callable[[str], object]) -> list[Verdict]:
    """All checks of every family we vouch for, with random tiny weights, and that the others are refused."""
    verdicts: list[Verdict] = []
    sequences = parity.Sequences.random(families.VOCABULARY)
    for family in families.FAMILIES:
        model = families.tiny_model(family).to(device)  # pyright: ignore[reportArgumentType]
        verdicts += verify_model(family, model, backends, sequences=sequences, tell=tell)
    for family in families.REFUSED:
        model = families.tiny_model(family)
        found = verify_model(family, model, backends[:1], sequences=sequences, tell=lambda done: None)
        is_refused = [verdict.check for verdict in found] == ["refused"]
        why = found[0].why_not if is_refused else "it should be refused and was not"
        verdicts.append(Verdict(family, "any", "refused", None, why, is_refused))
    return verdicts


def as_table(verdicts: Sequence[Verdict]) -> str:
    """One line a model and backend: the worst error of all checks, and by name the checks that failed."""
    width = max(10, *(len(verdict.backend) for verdict in verdicts))
    lines = [f"  {'model':<16} {'backend':<{width}} {'checks':>6}  {'forward':>8} {'gradient':>8}  verdict"]
    for model, backend in dict.fromkeys((verdict.model, verdict.backend) for verdict in verdicts):
        mine = [verdict for verdict in verdicts if (verdict.model, verdict.backend) == (model, backend)]
        failed = [verdict for verdict in mine if not verdict.passed]
        forward = [verdict.found.forward for verdict in mine if verdict.found]
        gradient = [verdict.found.gradient for verdict in mine if verdict.found and verdict.found.gradient is not None]
        lines.append(
            f"  {_fit(model, 16)} {backend:<{width}} {len(mine):>6}  {_worst(forward)} {_worst(gradient)}  "
            + ("refused, as it must be" if mine[0].check == "refused" and not failed else "FAILED" if failed else "ok")
        )
        lines += [f"      {_failure(verdict)}" for verdict in failed]
    return "\n".join(lines)


def _fit(name: str, width: int) -> str:
    return name.ljust(width) if len(name) <= width else "…" + name[1 - width :]


def _worst(errors: Sequence[float]) -> str:
    return f"{max(errors):8.1e}" if errors else f"{'':8}"


def _failure(verdict: Verdict) -> str:
    if verdict.found is None:
        return f"{verdict.check}: {verdict.why_not}"
    gradient = "" if verdict.found.gradient is None else f", gradients {verdict.found.gradient:.1e}"
    return f"{verdict.check}: off by {verdict.found.forward:.1e} of the largest hidden state{gradient}"


def as_json(verdicts: Sequence[Verdict]) -> list[dict[str, object]]:
    """Every check as plain data."""
    return [
        {
            "model": verdict.model,
            "backend": verdict.backend,
            "check": verdict.check,
            "forward_error": verdict.found.forward if verdict.found else None,
            "gradient_error": verdict.found.gradient if verdict.found else None,
            "why_not": verdict.why_not,
            "passed": verdict.passed,
        }
        for verdict in verdicts
    ]
