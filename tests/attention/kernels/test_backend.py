"""What the backend says it cannot do, and that it can be imported where Triton is absent."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from rlhf_cli.attention.backends import kernels
from rlhf_cli.attention.contract import Request
from rlhf_cli.attention.layout import Layout


@pytest.fixture(autouse=True)
def _not_interpreted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def request_of(head_size: int = 64, dtype: torch.dtype = torch.float16, device: str = "cuda", value_size: int = 64):
    return Request(
        layout=Layout.dense(1, 4),
        causal=True,
        window=None,
        softcap=None,
        has_sinks=False,
        has_bias=False,
        heads=2,
        key_heads=1,
        head_size=head_size,
        value_size=value_size,
        dtype=dtype,
        device=torch.device(device),
        needs_grad=True,
        needs_logsumexp=True,
    )


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (request_of(), None),
        (request_of(head_size=20, value_size=256), None),
        (request_of(dtype=torch.bfloat16), None),
        (request_of(dtype=torch.float64), "it computes in float32 at most, and the query is float64"),
        (request_of(head_size=257), "its heads are at most 256 wide, and these are 257"),
        (request_of(value_size=512), "its heads are at most 256 wide, and these are 512"),
        (request_of(device="cpu"), "it runs on CUDA devices, and the query is on cpu"),
    ],
)
def test_it_says_what_it_cannot_do(request_, reason):
    assert kernels.BACKEND.unsupported(request_) == reason


def test_the_interpreter_takes_the_cpu_but_no_bfloat16(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.BACKEND.unsupported(request_of(device="cpu")) is None
    found = kernels.BACKEND.unsupported(request_of(device="cpu", dtype=torch.bfloat16))
    assert found == "Triton's interpreter rounds bfloat16 wrongly"


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernels.BACKEND.missing() == "triton is not installed"


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.BACKEND.missing() == "it needs a CUDA device, or TRITON_INTERPRET=1"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.BACKEND.missing() is None


def test_it_is_imported_without_triton():
    code = "import sys; sys.modules['triton'] = None; import rlhf_cli.attention.backends.kernels, sys"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
