"""The kernels through Triton's own launcher, for three GPUs that are not there.

What the machine code of the kernels of training holds is tested in tests/attention/kernels/test_compilation.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attention.kernels.helper_process import answers_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
TRAINING = {"forward_kernel", "row_sums_kernel", "dq_kernel", "dkdv_kernel"}
DECODING = {"partial_kernel", "merge_kernel"}
MOST_VARIANTS = 2
"""Triton compiles a kernel again where an integer becomes divisible by 16, or equal to 1: once each is enough."""
MOST_SPILLED = {80: 8, 89: 8, 90: 0}


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[..., dict[str, Any]]]:
    """The program driver.py; values of a question by name."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with answers_of("../../gpu/driver.py", environment | {"PYTHONPATH": root}) as found:

        def ask(**question: Any) -> dict[str, Any]:
            answer = found(json.dumps(question))
            assert "error" not in answer, answer["error"]
            return answer

        yield ask


@pytest.mark.parametrize(
    ("capability", "kind", "head_size"),
    [(80, "tree", 128), (89, "tree", 64), (90, "tree", 128), (90, "packed", 64),
     (80, "decoding", 64), (89, "decoding", 128), (90, "decoding", 128)],
)  # fmt: skip
def test_lengths_do_not_recompile(capability: int, kind: str, head_size: int, ask: Callable[..., dict[str, Any]]):
    found = ask(capability=capability, layouts=kind, head_size=head_size, count=24)
    names = DECODING if kind == "decoding" else TRAINING
    assert found["launches"] == dict.fromkeys(names, 24)
    assert {name: len(made) for name, made in found["binaries"].items() if len(made) > MOST_VARIANTS} == {}
    assert all(one["shared"] <= SHARED_MEMORY[capability] for made in found["binaries"].values() for one in made)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_the_kernels_of_decoding_do_not_spill(capability: int, ask: Callable[..., dict[str, Any]]):
    found = ask(capability=capability, layouts="decoding", head_size=64, count=1, machine_code=True)
    assert set(found["binaries"]) == DECODING
    for name, made in found["binaries"].items():
        for one in made:
            assert max(one["spill_stores"], one["spill_loads"], one["stack"] // 4) <= MOST_SPILLED[capability], name


def test_a_tile_that_does_not_fit_is_refused_by_the_launcher(ask: Callable[..., dict[str, Any]]):
    with pytest.raises(AssertionError, match="OutOfResources"):
        ask(capability=89, layouts="tree", head_size=256, count=1)
