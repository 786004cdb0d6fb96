"""The backends, what each supports, and which one serves a call."""

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
from rlhf_cli.precision import autocast

AUTO = "auto"


chosen: dict[str, str] = {}
"""What `auto` has taken in this process, with the first reason for each."""


@dataclass(frozen=True)
class Choice:
    """A backend, and why it was taken."""

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
    """Attention by any backend; the arguments are those of `contract.AttentionFunction`, with their usual defaults.

    Keys and values are taken in the dtype of the query, and under autocast all three, and so the output, in its dtype.

    `needs_logsumexp` leaves backends out that do not give it.

    Raises:
        UsageError: the backend is unknown, absent here, or does not support this call.
    """
    layout = layout if layout is not None else Layout.dense(query.shape[0], query.shape[2], key.shape[2])
    if bias is not None and bias.dim() < 4:
        bias = bias[(None,) * (4 - bias.dim())]
    kind = query.device.type
    is_mixed = torch.is_autocast_enabled(kind) and query.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if is_mixed else query.dtype
    # As autocast does for torch's own attention; inside, every backend computes in the precision it promises.
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    rules: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap, "sinks": sinks, "bias": bias}
    request = Request.of(query, key, value, layout, **rules, needs_logsumexp=needs_logsumexp)
    attend = choose(request, backend).backend.attend
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    with autocast(kind, torch.float32) if is_mixed else nullcontext():
        found = attend(query, key, value, layout, scale=factor, **rules)
    output, logsumexp = (found, None) if isinstance(found, Tensor) else found
    if needs_logsumexp and logsumexp is None:
        raise UsageError(f"attention backend `{backend}` gives no log-sum-exp, which this call needs")
    return AttentionOutput(output, logsumexp)


def choose(request: Request, name: str = AUTO) -> Choice:
    """The backend for a call.

    Args:
        request: the call.
        name: a backend's name, `package.module:function`, or `auto`: the first of `_order` that serves the call.

    Raises:
        UsageError: the named backend is unknown, absent here, or does not support the call.
    """
    if name != AUTO:
        backend = find(name)
        if (reason := backend.missing() or backend.unsupported(request)) is not None:
            raise UsageError(f"attention backend `{name}`: {reason}", hint="rerun with `--attention auto`")
        return Choice(backend, "asked for")
    passed_over: list[str] = []
    for candidate in _order(request):
        backend = find(candidate)
        if (reason := backend.missing() or backend.unsupported(request)) is None:
            reason = "; ".join(passed_over) or "first in order for such calls"
            chosen.setdefault(candidate, reason)
            return Choice(backend, reason)
        passed_over.append(f"not `{candidate}`: {reason}")
    raise UsageError(f"no attention backend serves this call: {'; '.join(passed_over)}")


def _order(request: Request) -> tuple[str, ...]:
    """What `auto` tries, in order: torch's own kernels where they are made for the call, else ours."""
    is_plain = request.window is None and request.softcap is None and not (request.has_sinks or request.has_bias)
    if request.layout.is_dense and is_plain:
        return ("torch", "triton", "tiled", "reference")
    return ("triton", "torch", "tiled", "reference")


def find(name: str) -> Backend:
    """A backend by its name, or a user's own by `package.module:function`.

    Raises:
        UsageError: there is none of that name.
    """
    if ":" in name:
        return _custom(name)
    backends = built_in()
    if name not in backends:
        raise UsageError(
            f"no attention backend is named `{name}`",
            hint=f"choose one of {', '.join(backends)}, or name a function of your own as package.module:function",
        )
    return backends[name]


@cache
def built_in() -> dict[str, Backend]:
    """Our own backends by name."""
    found: dict[str, Backend] = {}
    for name in _BUILT_IN:
        backend = importlib.import_module(f"rlhf_cli.attention.backends.{name}").BACKEND
        found[backend.name] = backend
    return found


@cache
def _custom(name: str) -> Backend:
    module, _, function = name.partition(":")
    try:
        attend: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"cannot import attention backend `{name}`: {error}",
            hint="give package.module:function, with the package's folder in PYTHONPATH",
        ) from error
    if not callable(attend):
        raise UsageError(f"attention backend `{name}` is no function but a {type(attend).__name__}")
    return Backend(
        name,
        "your own",
        _guarded(name, cast(AttentionFunction, attend)),
        missing=lambda: None,
        unsupported=lambda request: None,
    )


def _guarded(name: str, attend: AttentionFunction) -> AttentionFunction:
    """A user's function, whose mistakes are told as theirs."""

    def call(query: Tensor, key: Tensor, value: Tensor, layout: Layout, **rules: Any) -> AttentionOutput:
        try:
            found = attend(query, key, value, layout, **rules)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the user's code raises
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise UsageError(
                f"attention backend `{name}` raised {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})",
                hint="docs/attention.md says what it is called with",
            ) from error
        output = found[0] if isinstance(found, tuple) and found else found
        if not isinstance(output, Tensor):
            raise UsageError(
                f"attention backend `{name}` returned {type(found).__name__} and no tensor",
                hint="return the output, or the output and the log-sum-exp",
            )
        expected = (*query.shape[:-1], value.shape[-1])
        if tuple(output.shape) != expected:
            raise UsageError(
                f"attention backend `{name}` returned a tensor of shape {tuple(output.shape)}, not {expected}",
                hint="return (batch, query heads, query rows, value size)",
            )
        return AttentionOutput(output, None if found is output else found[1])

    return call


def names() -> tuple[str, ...]:
    """What `model.attention` may be, besides a function of one's own and transformers' own names."""
    return (AUTO, *built_in())


# Modules of `backends/`, each with a BACKEND.
_BUILT_IN = ("reference", "tiled", "library", "kernels")
