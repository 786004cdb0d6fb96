"""What `rlhf doctor` finds, and the command that it prints for each."""

from __future__ import annotations

import importlib.util
import shutil
import webbrowser

import pytest

from rlhf_cli.cli import machine_checks as checks
from rlhf_cli.cli.hardware import print_report


@pytest.fixture
def without(monkeypatch):
    """Makes modules and programs look as if they were not installed."""

    def hide(*names: str) -> None:
        find, which = importlib.util.find_spec, shutil.which
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else find(name))
        monkeypatch.setattr(shutil, "which", lambda name: None if name in names else which(name))

    return hide


def test_each_extra_has_the_command_that_installs_it(without):
    without("bitsandbytes", "lm_eval", "matplotlib", "starlette", "choix", "python_calamine", "vllm")
    found = {one.message.split(" is not")[0]: one for one in checks.missing_extras(has_gpu=True)}
    assert list(found) == [
        "bitsandbytes", "lm-eval", "matplotlib", "starlette", "choix", "python-calamine", "vllm",
    ]  # fmt: skip
    assert "rlhf-cli[quantized]" in found["bitsandbytes"].fix
    assert "rlhf-cli[tasks]" in found["lm-eval"].fix
    assert "-m venv" in found["vllm"].fix
    assert not any(one.blocks for one in found.values())
    assert "vllm" not in " ".join(one.message for one in checks.missing_extras(has_gpu=False))


def test_a_package_that_every_run_needs_stops_it():
    (found,) = checks.check_packages({"torch": "not installed", "peft": "1"}, {"torch": "2.0", "peft": "1"})
    assert found.blocks
    assert "'torch==2.0'" in found.fix


def test_too_little_memory_and_disk_stop_a_run():
    assert [one.blocks for one in checks.check_space(10**9, 10**8)] == [True, True]
    assert list(checks.check_space(10**10, 10**10)) == []


@pytest.mark.parametrize(
    ("threads", "environment", "many", "few"),
    [
        (8, {}, ["--set model.threads=4"], []),
        (8, {"OMP_NUM_THREADS": "8"}, ["unset OMP_NUM_THREADS"], []),
        (1, {"OMP_NUM_THREADS": "1"}, [], ["unset OMP_NUM_THREADS"]),
        (4, {}, [], []),
        (1, {}, [], []),
    ],
)
def test_threads(threads, environment, many, few):
    assert [one.fix for one in checks.too_many_threads(threads, 4, environment)] == many
    assert [one.fix for one in checks.few_threads(threads, 4, environment)] == few


def test_triton_needs_a_compiler_on_a_gpu(without, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    without("cc", "gcc", "clang", "dnf", "apk")
    (found,) = checks.check_compiler(has_gpu=True)
    assert "gcc" in found.fix
    assert not found.blocks
    assert list(checks.check_compiler(has_gpu=False)) == []
    monkeypatch.setenv("CC", "my-cc")
    assert list(checks.check_compiler(has_gpu=True)) == []


def test_without_a_browser_the_port_is_forwarded(monkeypatch):
    def no_browser() -> None:
        raise webbrowser.Error

    monkeypatch.setattr(webbrowser, "get", no_browser)
    (found,) = checks.check_browser()
    assert "ssh -L" in found.fix


def test_a_launcher_that_is_half_described_stops_a_run():
    (found,) = checks.check_launcher({"RANK": "1"})
    assert found.blocks
    assert found.fix.startswith("unset RANK")


def test_each_problem_is_a_line_with_its_command(capsys):
    versions = {"rlhf": "1", "python": "3", "torch": "2", "transformers": "5", "peft": "1", "accelerate": "1"}
    report = {
        "versions": versions,
        "platform": "x",
        "memory_bytes": 1,
        "disk_free_bytes": 1,
        "problems": [{"message": "torch is not installed", "fix": "pip install torch", "blocks": True}],
        "optional": [{"message": "vllm is not installed", "fix": "pip install vllm", "blocks": False}],
    }
    print_report(report)
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("problem: torch is not installed") + 1].strip() == "pip install torch"
    assert lines[lines.index("optional: vllm is not installed") + 1].strip() == "pip install vllm"
    assert lines[-1] == "1 of 1 problems stop a run"
