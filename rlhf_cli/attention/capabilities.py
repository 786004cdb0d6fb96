"""Which calls each attention backend supports on this machine; one sample call per feature is put to every backend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from rlhf_cli.attention import registry
from rlhf_cli.attention.contract import Request
from rlhf_cli.attention.layout import Layout
from rlhf_cli.errors import UsageError


def _sample_requests(device: torch.device) -> dict[str, Request]:
    """One sample call per feature, by name of the feature."""
    plain = Request(
        layout=Layout.dense(2, 16),
        causal=True,
        window=None,
        softcap=None,
        has_sinks=False,
        has_bias=False,
        heads=4,
        key_heads=4,
        head_size=64,
        value_size=64,
        dtype=torch.float32,
        device=device,
        needs_grad=True,
        needs_logsumexp=False,
    )
    return {
        "dense": plain,
        "padded": replace(plain, layout=Layout.padded(torch.tensor([[1, 1, 0], [0, 1, 1]], dtype=torch.bool))),
        "packed": replace(plain, layout=Layout.packed([[2, 3]])),
        "prefix tree": replace(plain, layout=Layout.tree([(4, [2, 3])])),
        "cross": replace(plain, layout=Layout.dense(2, 4, 8), causal=False),
        "cached": replace(plain, layout=Layout.dense(2, 1, 8), needs_grad=False),
        "fewer key heads": replace(plain, key_heads=2),
        "window": replace(plain, window=4),
        "softcap": replace(plain, softcap=30.0),
        "sinks": replace(plain, has_sinks=True),
        "bias": replace(plain, has_bias=True),
        "head size 20": replace(plain, head_size=20, value_size=20),
        "head size 256": replace(plain, head_size=256, value_size=256),
        "float16": replace(plain, dtype=torch.float16),
        "bfloat16": replace(plain, dtype=torch.bfloat16),
        "float64": replace(plain, dtype=torch.float64),
        "log-sum-exp": replace(plain, needs_logsumexp=True),
    }


def list_capabilities(device: torch.device | None = None) -> dict[str, Any]:
    """Report availability and supported features of every backend.

    Args:
        device: default: CUDA where available, else the CPU.

    Returns:
        `device`; `backends`: per name its `summary`, `missing` (why it cannot run here, else None) and `unsupported`
        (per feature the reason, None where supported); `auto`: per feature the backend that `auto` uses.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    requests = _sample_requests(device)
    backends = {}
    for name, backend in registry.built_in().items():
        missing = backend.missing()
        supported = {} if missing else requests
        unsupported = {feature: backend.unsupported(request) for feature, request in supported.items()}
        backends[name] = {"summary": backend.summary, "missing": missing, "unsupported": unsupported}
    auto = {feature: _auto_choice(request) for feature, request in requests.items()}
    return {"device": str(device), "backends": backends, "auto": auto}


def _auto_choice(request: Request) -> str | None:
    try:
        return registry.choose(request).backend.name
    except UsageError:
        return None


def as_table(found: dict[str, Any]) -> str:
    """Format the report as a table: one row per feature, one column per backend."""
    available = {name: facts for name, facts in found["backends"].items() if facts["missing"] is None}
    lines = [f"attention backends on {found['device']}", ""]
    for name, facts in found["backends"].items():
        lines.append(f"  {name:<11}{facts['summary']}")
        if facts["missing"] is not None:
            lines.append(f"  {'':<11}unavailable: {facts['missing']}")
    widths = [16, *(max(10, len(name) + 1) for name in available), 10]
    lines += ["", _table_row(["", *available, "auto"], widths)]
    reasons: list[str] = []
    for feature in found["auto"]:
        cells = [feature]
        for facts in available.values():
            reason = facts["unsupported"][feature]
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells.append("yes" if reason is None else f"no ({reasons.index(reason) + 1})")
        cells.append(found["auto"][feature] or "none")
        lines.append(_table_row(cells, widths))
    lines += ["", *(f"  ({number}) {reason}" for number, reason in enumerate(reasons, start=1))]
    return "\n".join(lines).rstrip()


def _table_row(cells: Iterable[str], widths: Iterable[int]) -> str:
    return "  " + " ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()
