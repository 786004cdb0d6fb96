"""Triton's own JIT and launcher against a driver that is none, for GPUs that this machine does not have.

Run as a program, since Triton must not be the interpreter: it answers every line of stdin, a question in JSON, with a
line of JSON. A kernel goes the way that it goes on a GPU, from the call to the launch: specialization of arguments,
cache of variants, compilation, the check of shared memory. It is not run. Without `machine_code`, compilation ends
before ptxas, which takes most of the time; what is then cached on disk is kept apart, or a later question with
`machine_code` would find it.
"""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "attention" / "kernels"))
from compile_sm90 import inspect

from rlhf_cli.attention.kernels import decode, function, launch
from rlhf_cli.attention.layout import Layout

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Most bytes for a program, by compute capability: an A100, an RTX 4090 and an H100."""
HEADS, KEY_HEADS = 8, 2


class FakeDriver:
    """A GPU of one compute capability; device `n` has capability `n`, so that their kernels are kept apart."""

    capability = 90

    def __init__(self) -> None:
        self.utils, self.launcher_cls = self, self._launcher
        self.binaries: dict[str, list[dict[str, int]]] = defaultdict(list)
        self.launches: dict[str, int] = defaultdict(int)
        self.has_machine_code = False

    @staticmethod
    def is_active() -> bool:
        """Triton asks which driver fits this machine."""
        return True

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """The key of Triton's cache."""
        return self.capability

    def get_current_stream(self, device: Any = None) -> int:
        """The default stream."""
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What Triton checks a kernel against."""
        return {
            "max_shared_mem": SHARED_MEMORY[device],
            "multiprocessor_count": 132,
            "warpSize": 32,
            "max_num_regs": 65536,
        }

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Keep what was compiled; called once per variant."""
        self.binaries[name].append({"shared": shared} | (inspect(kernel) if self.has_machine_code else {}))
        return 1, 1, 0, 0, 1024

    def _launcher(self, source: Any, metadata: Any) -> Any:
        def start(*_: Any, **__: Any) -> None:
            self.launches[metadata.name] += 1

        return start


def tensors(layout: Layout, head_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Query, key and value as models hand them over: (B, L, H, D) transposed."""

    def one(heads: int, length: int) -> torch.Tensor:
        return torch.zeros(layout.batch, length, heads, head_size, dtype=dtype).transpose(1, 2)

    return one(HEADS, layout.query_length), one(KEY_HEADS, layout.key_length), one(KEY_HEADS, layout.key_length)


def train(layout: Layout, head_size: int, dtype: torch.dtype, rules: dict[str, Any]) -> None:
    """Start all kernels of a forward and a backward pass."""
    query, key, value = (tensor.requires_grad_() for tensor in tensors(layout, head_size, dtype))
    found = function.attend(query, key, value, layout, scale=head_size**-0.5, causal=True, bias=None, **rules)
    found.output.float().sum().backward()


def generate(layout: Layout, head_size: int, dtype: torch.dtype, rules: dict[str, Any]) -> None:
    """Start the kernels of a decoded token."""
    decode.decode(*tensors(layout, head_size, dtype), layout, scale=head_size**-0.5, causal=True, **rules)


def layouts(kind: str, count: int, seed: int) -> list[Layout]:
    """Layouts of random lengths: groups of completions, packed sequences, or the steps of decoding."""
    draw = random.Random(seed)
    if kind == "tree":
        groups = [
            [(draw.randint(20, 200), [draw.randint(1, 150) for _ in range(4)]) for _ in range(2)] for _ in range(count)
        ]
        return [Layout.tree(group) for group in groups]
    if kind == "packed":
        return [Layout.packed([[draw.randint(5, 300) for _ in range(5)]]) for _ in range(count)]
    assert kind == "decoding"
    found = []
    for step in range(count):
        rows, length = draw.choice([1, 3, 8]), 40 + step
        is_real = torch.ones(rows, length, dtype=torch.bool)
        for row in range(rows):
            is_real[row, : draw.randint(0, 20)] = False
        found.append(Layout.padded(is_real, query_length=1, query_offset=length - 1))
    return found


def answer(fake: FakeDriver, question: dict[str, Any]) -> dict[str, Any]:
    """Start kernels for random layouts: launches and compiled variants of every kernel."""
    FakeDriver.capability = question["capability"]
    launch.capability_of = lambda device: FakeDriver.capability
    fake.binaries.clear()
    fake.launches.clear()
    fake.has_machine_code = question.get("machine_code", False)
    rules = {"window": None, "softcap": None, "sinks": None} | question.get("rules", {})
    if rules["sinks"]:
        rules["sinks"] = torch.zeros(HEADS)
    run = generate if question["layouts"] == "decoding" else train
    for layout in layouts(question["layouts"], question["count"], question.get("seed", 0)):
        run(layout, question["head_size"], getattr(torch, question.get("dtype", "bfloat16")), rules)
    return {"launches": dict(fake.launches), "binaries": dict(fake.binaries)}


def main() -> None:
    """Answer the lines of stdin."""
    fake, make_cubin = FakeDriver(), CUDABackend.make_cubin
    driver.set_active(fake)
    cache = Path(triton.knobs.cache.dir)
    for line in sys.stdin:
        question = json.loads(line)
        wants_code = question.get("machine_code", False)
        CUDABackend.make_cubin = make_cubin if wants_code else (lambda *_, **__: b"")
        triton.knobs.cache.dir = str(cache / ("whole" if wants_code else "without_machine_code"))
        for kernel in (launch.forward_kernel, launch.row_sums_kernel, launch.dq_kernel, launch.dkdv_kernel,
                       decode.partial_kernel, decode.merge_kernel):  # fmt: skip
            kernel.device_caches.clear()
        try:
            found = answer(fake, question)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
