"""Functions that a host calls on the fake GPU, and that return what JSON can hold.

rlhf_cli, and a torch that knows the fake GPU, are there only in the children of a host, so they are imported late.
"""

from __future__ import annotations

from typing import Any


def decode(model: str, rows: int, tokens: int, ends: int = 0) -> list[int]:
    """Draw completions for `rows` prompts in one batch, and count nothing else; returns their lengths.

    Args:
        model: folder.
        rows: number of completions.
        tokens: longest completion.
        ends: the token ids below it end a completion.
    """
    import torch

    from rlhf_cli.generation.generator import Request
    from rlhf_cli.generation.policy import Policy
    from rlhf_cli.generation.sampling import Sampling
    from rlhf_cli.generation.torch_generator import TorchGenerator
    from rlhf_cli.models.loading import ModelSource
    from tests.gpu.device import ledger

    source = ModelSource(model, device=torch.device("cuda"), attention="auto")
    policy = Policy.load(source, Sampling(max_new_tokens=tokens, batch_size=rows))
    policy.__dict__["stop_ids"] = set(range(ends))
    requests = [Request(policy.prompt_ids(f"{row} the cat sat on {row * 7}"), seed=row) for row in range(rows)]
    with policy.model():
        ledger.reset()
        return [len(one.ids) for one in TorchGenerator().generate(policy, requests)]


def refusals() -> dict[str, str]:
    """Return what the device says to what CUDA refuses: name of the case -> message; empty where it was allowed."""
    import torch

    here, there, host = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1"), torch.ones(3)
    rows = torch.tensor([0, 1])
    dropped = torch.ones(3, device="cuda")
    dropped.untyped_storage().resize_(0)
    cases = {
        "host": lambda: here + host,
        "other device": lambda: here + there,
        "host values": lambda: here.index_put((rows,), host[:2]),
        "matrix": lambda: torch.ones(2, 3, device="cuda") @ host,
        "embedding": lambda: torch.nn.functional.embedding(rows, torch.ones(4, 2, device="cuda")),
        "cat": lambda: torch.cat([here, host]),
        "where": lambda: torch.where(host > 0, here, 0.0),
        "numpy": lambda: here.numpy(),
        "generator": lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
        "random state": lambda: torch.cuda.set_rng_state(torch.get_rng_state()),
        "dropped": lambda: dropped + here,
        "view of dropped": lambda: dropped.detach(),
        "no such device": lambda: torch.cuda.set_device(2),
        "scalar of the host": lambda: here * host.sum(),
        "index of the host": lambda: here[rows],
        "same device": lambda: here.to("cuda:1") + there,
    }
    found = {}
    for name, case in cases.items():
        try:
            case()
            found[name] = ""
        except (RuntimeError, TypeError) as error:
            found[name] = str(error)
    return found


def events(code: str) -> dict[str, int]:
    """Run code as if it stood in rlhf_cli/probe.py, with `x` a tensor on the device; returns `kind line` -> count."""
    import torch

    from tests.gpu.device import ledger

    names = {"torch": torch, "x": torch.arange(6.0, device="cuda"), "is_large": torch.arange(6, device="cuda") > 2}
    program = compile(code, "/somewhere/rlhf_cli/probe.py", "exec")
    ledger.reset()
    exec(program, names)
    return {f"{event.kind} {event.line}": count for event, count in ledger.events.items()}


def device_bytes() -> list[int]:
    """Bytes held on both devices: before, with a tensor of 4,000 and a view of it, saved for backward, and after."""
    import torch

    from tests.gpu.device import ledger

    def held() -> int:
        return ledger.live[0]

    before, found = held(), []
    x = torch.ones(1000, device="cuda", requires_grad=True)
    view = x[10:]
    found.append(held() - before)
    y = (x * 2).square().sum()
    found.append(held() - before)  # x, x * 2 for the backward pass, and y
    y.backward()
    found.append(held() - before)  # x, its gradient and y
    del x, y, view
    found.append(held() - before)
    torch.ones(10, device="cuda:1").square_() * 2
    return [*found, ledger.live[1], ledger.peak[1]]


def random_numbers() -> dict[str, Any]:
    """Draw on the device and on the host, with states that are saved and restored."""
    import torch

    torch.manual_seed(5)
    state, host = torch.cuda.get_rng_state(), torch.get_rng_state()
    first = torch.rand(3, device="cuda").tolist()
    after = torch.rand(3, device="cuda").tolist()
    is_host_untouched = bool(torch.equal(host, torch.get_rng_state()))
    torch.cuda.set_rng_state(state)
    again = torch.rand(3, device="cuda").tolist()
    return {"first": first, "after": after, "again": again, "host": is_host_untouched, "bytes": state.numel()}
