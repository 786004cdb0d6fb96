"""The kernels against the reference by FlashAttention's rule, over layouts, features, dtypes and head sizes.

A part runs by default, and of verified sources one in five; RLHF_ALL_KERNEL_CASES=1 runs all. Without a GPU Triton's
interpreter runs the kernels.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.attention.kernels import verified
from tests.attention.kernels.cases import CASES, chosen
from tests.attention.kernels.helper_process import answers_of
from tests.attention.kernels.oracle import check_finite
from tests.attention.kernels.verified import runs_all, sample

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
NAMES = list(CASES) if runs_all() else sample(chosen())


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[[str, str], dict]]:
    """A process of its own that answers `oracle`'s questions."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    with answers_of("oracle.py", environment) as found:

        def ask(question: str, name: str) -> dict:
            answer = found(f"{question} {name}")
            assert "failure" not in answer, answer["failure"]
            return answer["results"]

        yield ask


def test_the_grid_is_as_large_as_promised():
    assert len(CASES) >= 400
    assert len(chosen()) >= 100


def test_all_cases_run_unless_these_very_sources_were_verified(monkeypatch, tmp_path):
    monkeypatch.delenv("RLHF_ALL_KERNEL_CASES", raising=False)
    monkeypatch.delenv("RLHF_VERIFY_KERNELS", raising=False)
    monkeypatch.setattr(verified, "ROOT", tmp_path)
    monkeypatch.setattr(verified, "RECORD", tmp_path / "verified.json")
    source = tmp_path / "rlhf_cli" / "attention" / "kernels" / "forward.py"
    source.parent.mkdir(parents=True)
    source.write_text("TILE = 64\n")
    names = [str(number) for number in range(12)]
    assert sample(names) == names, "no record"
    (tmp_path / "verified.json").write_text(json.dumps({"digest": verified.digest()}))
    assert sample(names) == ["0", "5", "10"]
    source.write_text("TILE = 32\n")
    assert sample(names) == names, "a changed kernel"
    source.write_text("TILE = 64\n")
    monkeypatch.setenv("RLHF_VERIFY_KERNELS", "1")
    assert sample(names) == names, "make verify-kernels"


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_nothing_is_measured_against_numbers_that_are_not_finite(number):
    for result in ("output", "d_query", "d_bias"):
        with pytest.raises(AssertionError, match=f"PyTorch's {result} is not finite"):
            check_finite({result: torch.tensor([0.0, number])}, "PyTorch's")
    row_without_keys = {"logsumexp": torch.tensor([0.0, -torch.inf])}
    check_finite(row_without_keys, "PyTorch's")
    with pytest.raises(AssertionError, match="logsumexp"):
        check_finite({"logsumexp": torch.tensor([0.0, abs(number)])}, "PyTorch's")


def _case(name: str) -> Any:
    is_skipped = CASES[name].dtype == torch.bfloat16 and not torch.cuda.is_available()
    reason = "Triton's interpreter rounds bfloat16 wrongly; a GPU runs this case"
    return pytest.param(name, marks=pytest.mark.skipif(is_skipped, reason=reason))


@pytest.mark.parametrize("name", [_case(name) for name in NAMES])
def test_error_is_within_that_of_pytorch(name, ask):
    too_large = {result: pair for result, pair in ask("errors", name).items() if not pair[0] <= pair[1]}
    assert not too_large


@pytest.mark.parametrize("name", ["tree: all, float32", "packed: plain, float16"])
def test_the_same_input_gives_the_same_bits(name, ask):
    assert all(error == 0 for error, _ in ask("repeats", name).values())


@pytest.mark.parametrize("name", ["tree: all, float32"])
def test_a_gradient_asked_for_alone_is_the_same(name, ask):
    assert all(error == 0 for error, _ in ask("single", name).values())
