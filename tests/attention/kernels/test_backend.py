"""What the backend says it cannot do, and that it can be imported where Triton is absent."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from rlhf_cli.attention.backends import kernels
from rlhf_cli.attention.contract import Request
from rlhf_cli.attention.kernels import arguments
from rlhf_cli.attention.layout import Layout

HOPPER = (9, 0, 227 * 1024)
AMPERE = (8, 0, 163 * 1024)
ADA = (8, 9, 99 * 1024)
TURING = (7, 5, 64 * 1024)


@pytest.fixture(autouse=True)
def _not_interpreted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Pretend that there is a GPU, a Hopper until told otherwise; what the backend remembers is forgotten."""
    caches = (kernels.has_triton, kernels.has_cuda, kernels.gpu_properties)

    def install(major: int, minor: int, shared: int) -> None:
        properties = SimpleNamespace(major=major, minor=minor, shared_memory_per_block_optin=shared)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        kernels.gpu_properties.cache_clear()

    for each in caches:
        each.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    install(*HOPPER)
    yield install
    for each in caches:
        each.cache_clear()


def request_of(
    head_size: int = 64,
    dtype: torch.dtype = torch.float16,
    device: str = "cuda",
    value_size: int = 64,
    has_bias: bool = False,
    needs_grad: bool = True,
):
    return Request(
        layout=Layout.dense(1, 4),
        causal=True,
        window=None,
        softcap=None,
        has_sinks=False,
        has_bias=has_bias,
        heads=2,
        key_heads=1,
        head_size=head_size,
        value_size=value_size,
        dtype=dtype,
        device=torch.device(device),
        needs_grad=needs_grad,
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


def test_it_refuses_rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert kernels.BACKEND.unsupported(request_of()) == "it runs on NVIDIA's GPUs, and this torch is built for ROCm"


def test_it_refuses_gpus_before_ampere(gpu):
    gpu(*TURING)
    found = kernels.BACKEND.unsupported(request_of())
    assert found == "it needs a GPU of compute capability 8.0, and this one's is 7.5"


@pytest.mark.parametrize(
    ("device", "call", "fits"),
    [
        (HOPPER, {"head_size": 256, "dtype": torch.bfloat16}, True),
        (AMPERE, {"head_size": 256, "dtype": torch.bfloat16}, True),
        (AMPERE, {"head_size": 256, "dtype": torch.bfloat16, "has_bias": True}, False),
        (ADA, {"head_size": 128}, True),
        (ADA, {"head_size": 65}, True),
        (ADA, {"head_size": 129}, False),
        (ADA, {"value_size": 129}, False),
        (ADA, {"head_size": 128, "has_bias": True}, True),
        (ADA, {"head_size": 129, "has_bias": True}, False),
        (ADA, {"head_size": 256, "dtype": torch.float32}, True),
        (ADA, {"head_size": 256, "dtype": torch.float32, "has_bias": True}, False),
        (ADA, {"head_size": 256, "dtype": torch.float32, "has_bias": True, "needs_grad": False}, True),
    ],
)
def test_it_refuses_tiles_that_do_not_fit_the_gpu(device, call, fits, gpu):
    gpu(*device)
    found = kernels.BACKEND.unsupported(request_of(**call))
    if fits:
        assert found is None
    else:
        assert re.fullmatch(rf"it needs \d+ bytes of shared memory .*, and the GPU gives {device[2]}", found)


def test_what_the_machine_has_is_looked_up_once(monkeypatch):
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: asked.append(name) or object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append("cuda") or True)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: asked.append(index) or SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=HOPPER[2]),
    )
    for _ in range(3):
        assert kernels.BACKEND.missing() is None
        assert kernels.BACKEND.unsupported(request_of(device="cuda:1")) is None
    assert asked == ["triton", "cuda", 1]


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


def test_the_tiles_of_a_call_are_those_of_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {0: (8, 9), 1: (12, 0)}[device.index])
    arguments.capability_of.cache_clear()
    found = [arguments.capability_of(torch.device(name)) for name in ("cuda:0", "cuda:1", "cpu")]
    arguments.capability_of.cache_clear()
    assert found == [89, 120, 0]
