"""Verify attention backends: run every batch layout of `parity` for models and backends, and report the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from rlhf_cli.attention import hugging_face, model_zoo, parity, registry
from rlhf_cli.errors import ModelError, UsageError


@dataclass(frozen=True)
class Verdict:
    """Result of one check of one model under one backend.

    Attributes:
        model: name of the model.
        backend: name of the backend.
        check: name of the batch layout; "refused" if the model was refused as a whole.
        deviation: from the baseline; None if the check did not run.
        reason: why the check did not run; None if it ran.
        passed: the deviation is within `parity.tolerance`, or an unsupported model was refused.
    """

    model: str
    backend: str
    check: str
    deviation: parity.Deviation | None
    reason: str | None
    passed: bool


def available_backends() -> list[str]:
    """Return the names of the backends that run on this machine."""
    return [name for name, backend in registry.built_in().items() if backend.missing() is None]


def verify_model(
    name: str,
    model: PreTrainedModel,
    backends: Sequence[str],
    *,
    sequences: parity.ProbeSequences,
    on_progress: Callable[[str], object],
) -> list[Verdict]:
    """Compare a model on all batch layouts under all backends.

    Args:
        name: name of the model.
        model: in evaluation mode, on its device.
        backends: names of the backends.
        sequences: the inputs.
        on_progress: called after each backend with a description of what was verified.
    """
    try:
        parity.require(model, name, hugging_face.implementation(backends[0]))
    except ModelError as error:
        on_progress(name)
        return [Verdict(name, backend, "refused", None, error.message, False) for backend in backends]
    baseline = parity.Baseline(model, sequences, with_gradients=True)
    verdicts = []
    for backend in backends:
        verdicts += [_verdict(name, model, backend, layout, baseline) for layout in parity.batch_layouts_for(model)]
        on_progress(f"{name}, {backend}")
    return verdicts


def _verdict(name: str, model: PreTrainedModel, backend: str, layout: str, baseline: parity.Baseline) -> Verdict:
    limit = parity.tolerance(model.dtype)
    try:
        deviation = parity.compare(model, layout, baseline, hugging_face.implementation(backend))
    except UsageError as error:
        return Verdict(name, backend, layout, None, error.message, False)
    passed = deviation.forward <= limit.forward
    if deviation.gradient is not None and limit.gradient is not None:
        passed = passed and deviation.gradient <= limit.gradient
    return Verdict(name, backend, layout, deviation, None, passed)


def verify_model_zoo(
    backends: Sequence[str], *, device: torch.device, on_progress: Callable[[str], object]
) -> list[Verdict]:
    """Verify a tiny random model of every supported family, and check that unsupported families are refused.

    Args:
        backends: names of the backends.
        device: where the models run.
        on_progress: as in `verify_model`.
    """
    verdicts: list[Verdict] = []
    sequences = parity.ProbeSequences.random(model_zoo.VOCAB_SIZE)
    for family in model_zoo.SUPPORTED:
        model = model_zoo.tiny_model(family).to(device)  # pyright: ignore[reportArgumentType]
        verdicts += verify_model(family, model, backends, sequences=sequences, on_progress=on_progress)
    for family in model_zoo.UNSUPPORTED:
        model = model_zoo.tiny_model(family)
        results = verify_model(family, model, backends[:1], sequences=sequences, on_progress=lambda done: None)
        is_refused = [verdict.check for verdict in results] == ["refused"]
        reason = results[0].reason if is_refused else "expected to be refused, but was accepted"
        verdicts.append(Verdict(family, "any", "refused", None, reason, is_refused))
    return verdicts


def as_table(verdicts: Sequence[Verdict]) -> str:
    """Format one line per model and backend: the largest deviations of all checks, then the failed checks by name."""
    width = max(10, *(len(verdict.backend) for verdict in verdicts))
    lines = [f"  {'model':<16} {'backend':<{width}} {'checks':>6}  {'forward':>8} {'gradient':>8}  verdict"]
    for model, backend in dict.fromkeys((verdict.model, verdict.backend) for verdict in verdicts):
        checks = [verdict for verdict in verdicts if (verdict.model, verdict.backend) == (model, backend)]
        failed = [verdict for verdict in checks if not verdict.passed]
        deviations = [verdict.deviation for verdict in checks if verdict.deviation]
        forward = [deviation.forward for deviation in deviations]
        gradient = [deviation.gradient for deviation in deviations if deviation.gradient is not None]
        is_refused = checks[0].check == "refused"
        result = "FAILED" if failed else "refused, as expected" if is_refused else "ok"
        lines.append(
            f"  {_fit(model, 16)} {backend:<{width}} {len(checks):>6}  {_max(forward)} {_max(gradient)}  {result}"
        )
        lines += [f"      {_failure(verdict)}" for verdict in failed]
    return "\n".join(lines)


def _fit(name: str, width: int) -> str:
    return name.ljust(width) if len(name) <= width else "…" + name[1 - width :]


def _max(errors: Sequence[float]) -> str:
    return f"{max(errors):8.1e}" if errors else f"{'':8}"


def _failure(verdict: Verdict) -> str:
    if verdict.deviation is None:
        return f"{verdict.check}: {verdict.reason}"
    deviation = verdict.deviation
    gradient = "" if deviation.gradient is None else f", gradients by {deviation.gradient:.1e}"
    return f"{verdict.check}: hidden states differ by {deviation.forward:.1e} of the largest{gradient}"


def as_json(verdicts: Sequence[Verdict]) -> list[dict[str, object]]:
    """Return every check as a dictionary."""
    return [
        {
            "model": verdict.model,
            "backend": verdict.backend,
            "check": verdict.check,
            "forward_error": verdict.deviation.forward if verdict.deviation else None,
            "gradient_error": verdict.deviation.gradient if verdict.deviation else None,
            "reason": verdict.reason,
            "passed": verdict.passed,
        }
        for verdict in verdicts
    ]
