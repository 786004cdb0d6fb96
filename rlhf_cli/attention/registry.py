"""Attention backends by name, and the choice of one per call."""

from __future__ import annotations

import importlib
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from rlhf_cli.attention.contract import AttentionFunction, AttentionOutput, Backend, Request
from rlhf_cli.attention.layout import Layout
from rlhf_cli.errors import UsageError
from rlhf_cli.memory import is_out_of_memory
from rlhf_cli.precision import autocast

AUTO = "auto"


auto_choices: dict[str, str] = {}
"""Backends that `auto` has used in this process, with the reason at the first use."""


@dataclass(frozen=True)
class Choice:
    """A backend and the reason for choosing it."""

    backend: Backend
    reason: str


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = AUTO,
    needs_logsumexp: bool = False,
) -> AttentionOutput:
    """Compute attention with a backend.

    Keys and values are cast to the dtype of the query, which is also the dtype of the output. Under autocast it is the
    autocast dtype.

    Args:
        query: (B, H, Lq, D).
        key: (B, G, Lk, D).
        value: (B, G, Lk, Dv).
        layout: default: dense.
        scale: default: 1 / sqrt(D).
        causal, window, softcap, sinks: as in `contract.AttentionFunction`.
        bias: as in `contract.AttentionFunction`; leading dimensions may be missing.
        backend: name of a backend, `package.module:function`, or `auto`.
        needs_logsumexp: use only backends that return the log-sum-exp.

    Raises:
        UsageError: the backend is unknown, unavailable on this machine, or does not support this call.
    """
    layout = layout if layout is not None else Layout.dense(query.shape[0], query.shape[2], key.shape[2])
    if bias is not None and bias.dim() < 4:
        bias = bias[(None,) * (4 - bias.dim())]
    device = query.device.type
    is_mixed = torch.is_autocast_enabled(device) and query.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if is_mixed else query.dtype
    # Autocast casts the inputs of torch's own attention likewise. Inside a backend autocast is off: each one controls
    # its own precision.
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    rules: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap, "sinks": sinks, "bias": bias}
    request = Request.of(query, key, value, layout, **rules, needs_logsumexp=needs_logsumexp)
    attend = choose(request, backend).backend.attend
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    with autocast(device, torch.float32) if is_mixed else nullcontext():
        result = attend(query, key, value, layout, scale=factor, **rules)
    output, logsumexp = (result, None) if isinstance(result, Tensor) else result
    if needs_logsumexp and logsumexp is None:
        raise UsageError(f"attention backend `{backend}` returned no log-sum-exp, which this call requires")
    return AttentionOutput(output, logsumexp)


def choose(request: Request, name: str = AUTO) -> Choice:
    """Choose the backend for a call.

    Args:
        request: the call.
        name: name of a backend, `package.module:function`, or `auto` for the first of `order_of` that supports it.

    Raises:
        UsageError: the backend is unknown, unavailable on this machine, or does not support the call.
    """
    if name != AUTO:
        backend = find(name)
        if (reason := backend.missing() or backend.unsupported(request)) is not None:
            raise UsageError(f"attention backend `{name}`: {reason}", hint="rerun with `--attention auto`")
        return Choice(backend, "requested by name")
    rejected: list[str] = []
    for candidate in order_of(request):
        backend = find(candidate)
        if (reason := backend.missing() or backend.unsupported(request)) is None:
            reason = "; ".join(rejected) or "first choice for this call"
            auto_choices.setdefault(candidate, reason)
            return Choice(backend, reason)
        rejected.append(f"not `{candidate}`: {reason}")
    raise UsageError(f"no attention backend supports this call: {'; '.join(rejected)}")


def order_of(request: Request) -> tuple[str, ...]:
    """The order in which `auto` tries backends: torch first for plain dense calls, else our kernels first.

    On a GPU the gradients of torch's kernels are sums in no fixed order; those of ours are, and a run that resumes has
    the bytes of an uninterrupted one. So ours are first there for calls with a backward pass.
    """
    is_plain = request.window is None and request.softcap is None and not (request.has_sinks or request.has_bias)
    is_reproducible = request.device.type == "cpu" or not request.needs_grad
    if request.layout.is_dense and is_plain and is_reproducible:
        return ("torch", "triton", "tiled", "reference")
    return ("triton", "torch", "tiled", "reference")


def find(name: str) -> Backend:
    """Look up a backend by name, or import a user's function from `package.module:function`.

    Raises:
        UsageError: no backend has this name, or the function cannot be imported.
    """
    if ":" in name:
        return _custom(name)
    backends = built_in()
    if name not in backends:
        raise UsageError(
            f"unknown attention backend `{name}`",
            hint=f"use {', '.join(backends)}, or your own function as package.module:function",
        )
    return backends[name]


@cache
def built_in() -> dict[str, Backend]:
    """Return the built-in backends by name."""
    backends: dict[str, Backend] = {}
    for name in _BUILT_IN:
        backend = importlib.import_module(f"rlhf_cli.attention.backends.{name}").BACKEND
        backends[backend.name] = backend
    return backends


@cache
def _custom(name: str) -> Backend:
    module, _, function = name.partition(":")
    try:
        attend: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"cannot import attention backend `{name}`: {error}",
            hint="use package.module:function, and add the folder that holds the package to PYTHONPATH",
        ) from error
    if not callable(attend):
        raise UsageError(f"attention backend `{name}` must be a function, got {type(attend).__name__}")
    return Backend(
        name,
        "user-defined function",
        _guarded(name, cast(AttentionFunction, attend)),
        missing=lambda: None,
        unsupported=lambda request: None,
    )


def _guarded(name: str, attend: AttentionFunction) -> AttentionFunction:
    """Wrap a user's function so that its errors are reported as errors of that function."""

    def call(query: Tensor, key: Tensor, value: Tensor, layout: Layout, **rules: Any) -> AttentionOutput:
        try:
            result = attend(query, key, value, layout, **rules)
        except Exception as error:  # a user's code may raise anything
            if is_out_of_memory(error):
                raise
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise UsageError(
                f"attention backend `{name}` raised {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})",
                hint="docs/attention.md lists the arguments it is called with",
            ) from error
        output = result[0] if isinstance(result, tuple) and result else result
        if not isinstance(output, Tensor):
            raise UsageError(
                f"attention backend `{name}` must return a tensor, got {type(result).__name__}",
                hint="return the output, or a tuple of the output and the log-sum-exp",
            )
        expected = (*query.shape[:-1], value.shape[-1])
        if tuple(output.shape) != expected:
            raise UsageError(
                f"attention backend `{name}` must return a tensor of shape {expected}, got {tuple(output.shape)}",
                hint="the output has shape (batch, query heads, query length, value head size)",
            )
        return AttentionOutput(output, None if result is output else result[1])

    return call


def names() -> tuple[str, ...]:
    """Return our names for `model.attention`: `auto` and the built-in backends."""
    return (AUTO, *built_in())


# Modules of `backends/`; each defines BACKEND.
_BUILT_IN = ("reference", "tiled", "library", "kernels")
