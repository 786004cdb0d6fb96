"""The fake GPU itself: it refuses, counts and accounts as a real one would."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.running import Host

ALLOWED = {"scalar of the host", "index of the host", "same device", "view of dropped"}


def test_it_refuses_what_cuda_refuses(gpu: Host, tmp_path: Path):
    found = gpu.call(tmp_path, "tests.gpu.scenarios:refusals").result
    assert {name for name, message in found.items() if not message} == ALLOWED
    assert "cpu and cuda:0" in found["host"]
    assert "cuda:0 and cuda:1" in found["other device"]
    assert "Tensor.cpu()" in found["numpy"]
    assert "memory is freed" in found["dropped"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x.sum().item()", {"sync probe.py:1": 1}),
        ("float(x[0]); bool(x[1] > 0)", {"sync probe.py:1": 2}),
        ("x.tolist()", {"sync probe.py:1": 1}),
        ("x.cpu()", {"sync probe.py:1": 1}),
        ("x.nonzero()", {"sync probe.py:1": 1}),
        ("x[is_large]", {"sync probe.py:1": 1}),
        ("x[is_large] = 0.0", {"sync probe.py:1": 1}),
        ("if x.any():\n    pass", {"sync probe.py:1": 1}),
        ("torch.equal(x, x)", {"sync probe.py:1": 1}),
        ("torch.cuda.synchronize()", {"sync probe.py:1": 1}),
        ("y = x * 2\nprint(y)\nz = y.item", {}),
        ("torch.tensor([1, 2], device='cuda')", {"upload probe.py:1": 1}),
        ("torch.ones(3).to('cuda')", {"upload probe.py:1": 1}),
        ("torch.ones(3).pin_memory().to('cuda', non_blocking=True)", {}),
        ("x[[0, 2]]", {"upload probe.py:1": 1}),
        ("torch.zeros(3, device='cuda'); x.masked_fill(is_large, 0.0); torch.where(is_large, x, 0.0); x[2:]", {}),
        ("def f():\n    return x.max()\n\n\nf().item()", {"sync probe.py:5": 1}),
    ],
)
def test_it_counts_what_holds_the_host_up(code: str, expected: dict[str, int], gpu: Host, tmp_path: Path):
    assert gpu.call(tmp_path, "tests.gpu.scenarios:events", named={"code": code}).result == expected


def test_it_accounts_for_every_storage_once_until_it_is_freed(gpu: Host, tmp_path: Path):
    with_view, saved, after_backward, freed, other, peak = gpu.call(tmp_path, "tests.gpu.scenarios:device_bytes").result
    assert with_view == 4000
    assert saved == 8004
    assert after_backward == 8004
    assert freed == 0
    assert other == 0
    assert peak == 80


def test_its_random_numbers_have_a_state_of_their_own(gpu: Host, tmp_path: Path):
    found = gpu.call(tmp_path, "tests.gpu.scenarios:random_numbers").result
    assert found["first"] == found["again"] != found["after"]
    assert found["host"]
    assert found["bytes"] == 16
