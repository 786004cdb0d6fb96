"""A GPU that torch cannot use is named, with the reason and the command that changes it."""

from __future__ import annotations

import pytest
import torch

from rlhf_cli.errors import ModelError
from rlhf_cli.models import device, gpu_check
from rlhf_cli.models.device import resolve_device
from rlhf_cli.models.gpu_check import has_nvidia_gpu, unused_gpu


@pytest.fixture(autouse=True)
def _no_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "has_nvidia_gpu", lambda: True)


@pytest.mark.parametrize(
    ("file", "variable", "expected"),
    [
        ("dev/nvidia0", None, True),
        ("proc/driver/nvidia/gpus/0000:01:00.0/information", None, True),
        ("usr/lib/wsl/lib/libcuda.so.1", None, True),
        ("dev/nvidiactl", None, False),  # containers without a GPU have it
        ("dev/nvidia0", "", False),
        ("dev/nvidia0", "-1", False),
        ("dev/nvidia0", "0,1", True),
    ],
)
def test_a_gpu_is_found_without_torch(file, variable, expected, tmp_path, monkeypatch):
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    assert has_nvidia_gpu(tmp_path) is expected
    assert not has_nvidia_gpu(tmp_path / "nothing")


def test_a_torch_without_cuda_is_named_with_the_command_that_installs_another(with_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    found = unused_gpu()
    assert found is not None
    assert "is built without CUDA" in found.reason
    assert f"torch {torch.__version__.partition('+')[0]}" in found.fix.replace("==", " ")
    with pytest.raises(ModelError, match="is built without CUDA") as refused:
        resolve_device("cuda")
    assert refused.value.hint is not None
    assert found.fix in refused.value.hint


def test_the_reason_of_torch_is_shown_for_a_driver_that_does_not_fit(with_gpu, monkeypatch):
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nmore")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    found = unused_gpu()
    assert found is not None
    assert found.reason.endswith("cannot use it: The NVIDIA driver on your system is too old (found version 11040).")
    assert "CUDA 13.0" in found.fix


def test_auto_takes_the_cpu_and_warns_once(with_gpu, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(device, "warn", said.append)
    monkeypatch.setattr(torch.version, "cuda", None)
    device.warn_of_unused_gpu.cache_clear()
    assert [resolve_device("auto").type for _ in range(3)] == ["cpu"] * 3
    device.warn_of_unused_gpu.cache_clear()
    assert len(said) == 1
    assert "this machine has an NVIDIA GPU" in said[0]


def test_no_gpu_is_no_problem():
    assert unused_gpu() is None
    with pytest.raises(ModelError, match="torch finds no CUDA device"):
        resolve_device("cuda")


def test_mps_is_refused_with_its_reason():
    with pytest.raises(ModelError, match=r"`model\.device: mps` is not supported: sampling uses float64"):
        resolve_device("mps")


def test_doctor_reports_it(with_gpu, monkeypatch):
    from rlhf_cli.cli.hardware import examine

    monkeypatch.setattr("platform.platform", lambda: "")  # starts a process
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("RANK", "1")
    problems = examine()["problems"]
    blocks = {one["message"]: one["blocks"] for one in problems}
    assert [blocks[message] for message in blocks if "is built without CUDA" in message] == [False]
    assert [blocks[message] for message in blocks if "the environment sets RANK=1 but not" in message] == [True]
