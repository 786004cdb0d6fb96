"""The kernels as a GPU would run them, compiled for Hopper on any machine: tensor cores are used and nothing spills."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from rlhf_cli.attention.kernels import tiles
from tests.attention.kernels.helper_process import answers_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
KERNELS = [":".join(parts) for parts in itertools.product(("forward", "dkdv", "dq"), ("64", "128"), ("dense", "tree"))]
SHARED_MEMORY_OF_HOPPER = 227 * 1024


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[[str], dict]]:
    """A process that compiles, without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with answers_of("compile_sm90.py", environment) as found:
        yield found


@pytest.fixture(scope="module")
def shared_memory() -> Iterator[Callable[[str], int]]:
    """Bytes of shared memory that a kernel takes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with answers_of("compile_shared.py", environment, "-") as found:
        yield lambda question: found(question)["shared"]


@pytest.mark.parametrize(
    ("question", "call"),
    [
        ("forward:128:dense:bfloat16::80", {"head_size": 72, "needs_grad": False}),
        ("forward:256:dense:bfloat16:window,softcap,sinks,bias:90", {"head_size": 256, "has_bias": True}),
        ("dq:64:tree:bfloat16::80", {"head_size": 16}),
        ("dkdv:256:dense:float32::90", {"head_size": 129, "is_32_bit": True}),
        (
            "decode:256:dense:float32:window,softcap,sinks:80",
            {"head_size": 256, "is_32_bit": True, "needs_grad": False},
        ),
    ],
)
def test_the_table_of_shared_memory_is_what_the_compiler_says(question, call, shared_memory):
    call = {"is_32_bit": False, "has_bias": False, "needs_grad": True} | call
    assert tiles.shared_memory(**call, capability=int(question[-2])) == shared_memory(question)


@pytest.mark.parametrize("kernel", KERNELS)
def test_hopper_gets_tensor_cores_and_no_spills(kernel, ask):
    found = ask(kernel)
    assert found["hgmma"] > 0
    assert found["spill_stores"] == found["spill_loads"] == found["stack"] == 0
    assert found["shared"] <= SHARED_MEMORY_OF_HOPPER
