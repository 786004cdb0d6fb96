"""The kernels as a GPU would run them, compiled for Hopper on any machine: tensor cores are used and nothing spills."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator

import pytest

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


@pytest.mark.parametrize("kernel", KERNELS)
def test_hopper_gets_tensor_cores_and_no_spills(kernel, ask):
    found = ask(kernel)
    assert found["hgmma"] > 0
    assert found["spill_stores"] == found["spill_loads"] == found["stack"] == 0
    assert found["shared"] <= SHARED_MEMORY_OF_HOPPER
