"""The kernels as a GPU would run them, compiled on any machine: tensor cores are used, and few registers spill."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from rlhf_cli.attention.kernels import tiles
from tests.attention.kernels.helper_process import answers_of
from tests.attention.kernels.verified import runs_all, sample

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
KERNELS = [":".join(parts) for parts in itertools.product(("forward", "dkdv", "dq"), ("64", "128"), ("dense", "tree"))]
FEATURES = ("window", "window,softcap,sinks", "bias", "window,softcap,sinks,bias")
# Most bytes for a program: an A100, an RTX 4090 and an H100.
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
# A spill of this many is a few loads and stores outside of the loop over keys; the next larger tile spills dozens.
MOST_SPILLED_BEFORE_HOPPER = 8


def _with_features() -> list[str]:
    """Lines with features, for all GPUs: all with RLHF_ALL_KERNEL_CASES=1, else those with the most registers."""
    everything = [
        f"{kernel}:bfloat16:{features}:{capability}"
        for kernel, features, capability in itertools.product(KERNELS, FEATURES, SHARED_MEMORY)
    ]
    if runs_all():
        return everything
    return sample([line for line in everything if ":128:" in line and "sinks" in line and "dkdv:128:tree" not in line])


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
            "decode:128:dense:float32:window,softcap,sinks:80",
            {"head_size": 128, "is_32_bit": True, "needs_grad": False},
        ),
    ],
)
def test_the_table_of_shared_memory_is_what_the_compiler_says(question, call, shared_memory):
    call = {"is_32_bit": False, "has_bias": False, "needs_grad": True} | call
    assert tiles.shared_memory(**call, capability=int(question[-2])) == shared_memory(question)


@pytest.mark.parametrize(("capability", "expected"), [(80, 80), (86, 80), (89, 89), (120, 89), (90, 90), (100, 90)])
def test_a_gpu_gets_the_tiles_of_its_kind(capability, expected):
    call = {"is_32_bit": False, "is_tree": False, "has_softcap": False, "has_bias": False, "interpreted": False}
    of_kind = {80: (32, 64, 8, 2), 89: (64, 64, 8, 2), 90: (32, 64, 8, 2)}
    assert tiles.tile("dkdv", 128, capability=capability, **call) == of_kind[expected]
    of_kind = {80: (64, 32, 4, 2), 89: (64, 64, 8, 2), 90: (64, 128, 8, 2)}
    assert tiles.tile("dkdv", 32, capability=capability, **call) == of_kind[expected]


def test_the_case_with_the_smaller_tile_decides():
    call = {"is_32_bit": False, "capability": 90, "interpreted": False}
    plain, tree, bias, both = (
        tiles.tile("dq", 128, is_tree=is_tree, has_softcap=True, has_bias=has_bias, **call)
        for is_tree, has_bias in ((False, False), (True, False), (False, True), (True, True))
    )
    assert (plain, tree, bias, both) == ((128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 3), (64, 32, 8, 1))


@pytest.mark.parametrize("kernel", sample(KERNELS))
def test_hopper_gets_tensor_cores_and_no_spills(kernel, ask):
    found = ask(kernel)
    assert found["hgmma"] > 0
    assert spilled(found) == 0
    assert found["shared"] <= SHARED_MEMORY[90]


@pytest.mark.parametrize("capability", [80, 89])
@pytest.mark.parametrize("kernel", sample([kernel for kernel in KERNELS if kernel != "dkdv:128:tree"]))
def test_older_gpus_get_tensor_cores_and_few_spills(kernel, capability, ask):
    found = ask(f"{kernel}:bfloat16::{capability}")
    assert found["hmma"] > 0
    assert spilled(found) <= MOST_SPILLED_BEFORE_HOPPER
    assert found["shared"] <= SHARED_MEMORY[capability]


@pytest.mark.parametrize("kernel", _with_features())
def test_windows_softcaps_sinks_and_biases_spill_no_more(kernel, ask):
    capability = int(kernel[-2:])
    found = ask(kernel)
    assert found["hgmma" if capability == 90 else "hmma"] > 0
    assert spilled(found) <= (0 if capability == 90 else MOST_SPILLED_BEFORE_HOPPER)
    assert found["shared"] <= SHARED_MEMORY[capability]


def spilled(found: dict) -> int:
    """Registers that lie on the stack for want of room, 4 bytes each."""
    return max(found["spill_stores"], found["spill_loads"], found["stack"] // 4)
