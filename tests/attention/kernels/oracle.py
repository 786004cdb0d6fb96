"""FlashAttention's rule: twice (gradients: three times) the error that PyTorch makes at the same dtype is allowed.

`python oracle.py` answers on stdout, one JSON line for every line of stdin, which names a case; it needs
TRITON_INTERPRET=1 where there is no GPU. The interpreter gets a process of its own since Triton cannot leave it, and
`auto` would choose it for all that other tests compute.
"""

from __future__ import annotations

import json
import sys
import traceback

import torch
from torch import Tensor

if __name__ == "__main__":
    from cases import CASES, SINKS_VIEWS, Case, Inputs, inputs
else:
    from tests.attention.kernels.cases import CASES, SINKS_VIEWS, Case, Inputs, inputs
from rlhf_cli.attention.backends import kernels, reference
from rlhf_cli.attention.contract import AttentionOutput, Request

FORWARD = ("output", "logsumexp")
# In units of the largest true value, and of 0.3 at least, as in FlashAttention's tests: room for a rounding or two
# where PyTorch happens to be exact.
ATOL = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def eager(case: Case, leaves: dict[str, Tensor]) -> AttentionOutput:
    """The equation as PyTorch computes it in the dtype of its inputs, with nothing upcast."""
    query, key, value = leaves["query"], leaves["key"], leaves["value"]
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * case.settings["scale"]
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if "bias" in leaves:
        scores = scores + leaves["bias"]
    seen = case.layout.visible(causal=case.causal, window=case.window, device=query.device).unsqueeze(1)
    seen = seen & ~torch.isneginf(scores.detach())
    is_real = case.layout.is_real(query.device)[:, None, :, None]
    sinks = leaves.get("sinks", scores.new_full((query.shape[1],), -torch.inf)).view(1, -1, 1, 1)
    sinks = sinks.expand(*scores.shape[:3], 1)
    all_scores = torch.cat([scores.masked_fill(~seen, -torch.inf), sinks.masked_fill(~is_real, -torch.inf)], -1)
    sees_any = ~torch.isneginf(all_scores.detach()).all(-1, keepdim=True)
    safe = all_scores.masked_fill(~sees_any, 0.0)
    weights = safe.softmax(-1)[..., :-1].masked_fill(~seen, 0.0)
    return AttentionOutput(weights @ value, safe.logsumexp(-1).masked_fill(~sees_any.squeeze(-1), -torch.inf))


def seen_by_call(case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The leaves as a case's call gets them."""
    if "sinks" not in leaves:
        return leaves
    return leaves | {"sinks": SINKS_VIEWS[case.sinks_view][1](leaves["sinks"], case.heads[0])}


def results(case: Case, given: Inputs, attend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, log-sum-exp and the gradient of every leaf."""
    leaves = {name: tensor.to(DEVICE, dtype) for name, tensor in given.leaves.items()}
    if attend != "kernels":  # 0 x NaN is NaN in an eager gradient
        leaves = {name: torch.where(torch.isnan(leaf), 0.0, leaf) for name, leaf in leaves.items()}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    seen = seen_by_call(case, leaves)
    if attend == "eager":
        found = eager(case, seen)
    else:
        query, key, value = leaves["query"], leaves["key"], leaves["value"]
        function = kernels.attend if attend == "kernels" else reference.attend
        extra = {name: seen.get(name) for name in ("sinks", "bias")}
        found = function(query, key, value, case.layout, **case.settings, **extra)
    loss = (found.output * given.d_output.to(DEVICE, dtype)).sum()
    if given.d_logsumexp is not None:
        finite = torch.where(torch.isneginf(found.logsumexp), 0.0, found.logsumexp)
        loss = loss + (finite * given.d_logsumexp.to(DEVICE, finite.dtype)).sum()
    loss.backward()
    gradients = {f"d_{name}": leaf.grad for name, leaf in leaves.items()}
    return {"output": found.output.detach(), "logsumexp": found.logsumexp.detach(), **gradients}


def errors(case: Case) -> dict[str, tuple[float, float]]:
    """Of every result its largest error and the largest that is allowed."""
    given = inputs(case)
    found = results(case, given, "kernels", case.dtype)
    exact = results(case, given, "reference", torch.float64)
    plain = results(case, given, "eager", case.dtype)
    check_finite(exact, "the reference's")
    check_finite(plain, "PyTorch's")
    answer = {}
    for name, tensor in found.items():
        is_forward = name in FORWARD
        hidden = torch.isneginf(exact[name])
        assert torch.equal(torch.isneginf(tensor), hidden), f"{name} is -inf on the wrong rows"
        truth = exact[name].masked_fill(hidden, 0.0)
        ours, theirs = (each.double().masked_fill(hidden, 0.0) - truth for each in (tensor, plain[name]))
        tiny = ATOL[case.dtype] * max(_largest(truth), 0.3)
        allowed = (2 if is_forward else 3) * _largest(theirs) + tiny
        answer[name] = (_largest(ours), allowed)
    _check_padding(case, found)
    _check_shape(case, given, found)
    return answer


def _largest(difference: Tensor) -> float:
    """NaN counts as infinite."""
    return difference.abs().nan_to_num(nan=torch.inf).max().item() if difference.numel() else 0.0


def check_finite(results: dict[str, Tensor], whose: str) -> None:
    """Against NaN or infinity every error would be allowed; a row that sees nothing has a log-sum-exp of -inf."""
    for name, tensor in results.items():
        is_right = torch.isfinite(tensor) | (torch.isneginf(tensor) if name == "logsumexp" else False)
        assert is_right.all(), f"{whose} {name} is not finite"


def _check_padding(case: Case, found: dict[str, Tensor]) -> None:
    queries = ~case.layout.is_real(DEVICE)[:, None, :].expand(found["logsumexp"].shape)
    keys = ~case.layout.is_real_key(DEVICE)[:, None, :].expand(found["d_key"].shape[:3])
    assert torch.isneginf(found["logsumexp"][queries]).all(), "padding has a log-sum-exp"
    for name, rows in (("output", queries), ("d_query", queries), ("d_key", keys), ("d_value", keys)):
        assert (found[name][rows] == 0).all(), f"{name} is not 0 on padding"


def _check_shape(case: Case, given: Inputs, found: dict[str, Tensor]) -> None:
    assert found["output"].transpose(1, 2).is_contiguous(), "the output is not laid out as (B, L, H, D)"
    assert found["output"].dtype == case.dtype, "the output is not of the query's dtype"
    assert found["logsumexp"].dtype == torch.float32, "the log-sum-exp is not float32"
    query, key, value = (given.leaves[name].to(DEVICE) for name in ("query", "key", "value"))
    rest = {"sinks": given.leaves.get("sinks"), "bias": given.leaves.get("bias")}
    settings = {name: case.settings[name] for name in ("causal", "window", "softcap")}
    request = Request.of(query, key, value, case.layout, **settings, **rest)
    assert kernels.BACKEND.unsupported(request) is None, "the backend says it cannot"


def repeats(name: str, times: int = 3) -> dict[str, tuple[float, float]]:
    """The same bits every time."""
    case = CASES[name]
    first, *others = (results(case, inputs(case), "kernels", case.dtype) for _ in range(times))
    return {name: (float(not all(torch.equal(first[name], other[name]) for other in others)), 0.0) for name in first}


def single_gradients(name: str) -> dict[str, tuple[float, float]]:
    """Each gradient asked for alone is the one asked for with all others."""
    case = CASES[name]
    given = inputs(case)
    together = results(case, given, "kernels", case.dtype)
    answer = {}
    for wanted in given.leaves:
        leaves = {name: leaf.to(DEVICE) for name, leaf in given.leaves.items()}
        leaves[wanted] = leaves[wanted].clone().requires_grad_()
        seen = seen_by_call(case, leaves)
        extra = {name: seen.get(name) for name in ("sinks", "bias")}
        found = kernels.attend(leaves["query"], leaves["key"], leaves["value"], case.layout, **case.settings, **extra)
        loss = (found.output * given.d_output.to(DEVICE)).sum()
        if given.d_logsumexp is not None:
            finite = torch.where(torch.isneginf(found.logsumexp), 0.0, found.logsumexp)
            loss = loss + (finite * given.d_logsumexp.to(DEVICE)).sum()
        loss.backward()
        answer[f"d_{wanted}"] = (float(not torch.equal(leaves[wanted].grad, together[f"d_{wanted}"])), 0.0)
    return answer


def main() -> None:
    """Answer until stdin ends."""
    questions = {"errors": lambda name: errors(CASES[name]), "repeats": repeats, "single": single_gradients}
    for line in sys.stdin:
        question, name = line.rstrip("\n").split(" ", 1)
        try:
            answer = {"results": questions[question](name)}
        except Exception:
            answer = {"failure": traceback.format_exc()[-3000:]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
