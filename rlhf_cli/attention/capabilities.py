"""What each backend supports here, asked of the backends themselves with one call of every kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from rlhf_cli.attention import registry
from rlhf_cli.attention.contract import Request
from rlhf_cli.attention.layout import Layout
from rlhf_cli.errors import UsageError


def _requests(device: torch.device) -> dict[str, Request]:
    """One call of every kind, by its name."""
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


def abilities(device: torch.device | None = None) -> dict[str, Any]:
    """Of every backend why it does not run here, or why it does not serve each kind of call; None where it does.

    Args:
        device: None is CUDA where there is one, else the CPU.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    requests = _requests(device)
    backends = {}
    for name, backend in registry.built_in().items():
        missing = backend.missing()
        serves = {} if missing else {kind: backend.unsupported(request) for kind, request in requests.items()}
        backends[name] = {"summary": backend.summary, "missing": missing, "unsupported": serves}
    chosen = {kind: _chosen(request) for kind, request in requests.items()}
    return {"device": str(device), "backends": backends, "auto": chosen}


def _chosen(request: Request) -> str | None:
    try:
        return registry.choose(request).backend.name
    except UsageError:
        return None


def as_table(found: dict[str, Any]) -> str:
    """The same for people: backends as columns, kinds of calls as rows."""
    here = {name: facts for name, facts in found["backends"].items() if facts["missing"] is None}
    lines = [f"attention backends on {found['device']}", ""]
    for name, facts in found["backends"].items():
        lines.append(f"  {name:<11}{facts['summary']}")
        if facts["missing"] is not None:
            lines.append(f"  {'':<11}not here: {facts['missing']}")
    lines += [
        "",
        "  " + " ".join(f"{cell:<{width}}" for cell, width in zip(("", *here, "auto"), _widths(here), strict=True)),
    ]
    reasons: list[str] = []
    for kind in found["auto"]:
        cells = [kind]
        for facts in here.values():
            reason = facts["unsupported"][kind]
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells.append("yes" if reason is None else f"no ({reasons.index(reason) + 1})")
        cells.append(found["auto"][kind] or "none")
        lines.append(
            "  " + " ".join(f"{cell:<{width}}" for cell, width in zip(cells, _widths(here), strict=True)).rstrip()
        )
    lines += ["", *(f"  ({number}) {reason}" for number, reason in enumerate(reasons, start=1))]
    return "\n".join(lines).rstrip()


def _widths(here: dict[str, Any]) -> list[int]:
    return [16, *(max(10, len(name) + 1) for name in here), 10]
