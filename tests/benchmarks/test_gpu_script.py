"""`benchmarks/gpu.sh`: its first sections on tiny shapes, and what it does about sections that fail or take long."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.sh"

pytestmark = pytest.mark.slow

STUB = """#!/bin/bash
# Stands for Python: only the report is real.
case "$*" in
    *" collect "*) exec {python} "$@" ;;
    *find_spec*) exit 1 ;;
    *ppo_vs_trl*) {ppo} ;;
    *sft_vs_trl*) echo "no such model | nowhere"; exit 3 ;;
esac
exit 0
"""


TIMEOUT = """#!/bin/bash
# Stands for `timeout --kill-after=5 LIMIT COMMAND`: ends PPO soon.
case "$*" in
    *ppo_vs_trl*) exec {timeout} "$1" 0.5 "${{@:3}}" ;;
    *) exec {timeout} "$@" ;;
esac
"""


def run(folder: Path, python: Path | str, *arguments: str | Path) -> tuple[int, dict[str, dict], str]:
    """Run the script; returns its exit status, its sections by name and the report."""
    command = ["bash", SCRIPT, "--out", folder / "out", "--python", python, "--scratch", folder, *arguments]
    environment = os.environ | {"CI": "1", "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    report = (folder / "out" / "results.md").read_text(encoding="utf-8")
    assert done.stdout == report
    sections = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))["sections"]
    return done.returncode, {section["name"]: section for section in sections}, report


def stub(folder: Path, ppo: str = "exit 0") -> Path:
    path = folder / "python"
    path.write_text(STUB.format(python=sys.executable, ppo=ppo), encoding="utf-8")
    path.chmod(0o755)
    return path


def test_the_first_sections_run_on_tiny_shapes(tmp_path):
    status, sections, report = run(tmp_path, sys.executable, "--smoke")
    failed = {name: each for name, each in sections.items() if each["status"] not in ("0", "skipped")}
    logs = {name: (tmp_path / "out" / f"{name}.log").read_text(encoding="utf-8")[-2000:] for name in failed}
    assert (failed, logs, status) == ({}, {}, 0)
    measured = {name for name, section in sections.items() if section.get("result") and "report" in section["result"]}
    assert {"ppo-1b", "train-rm", "sft"} <= measured
    assert "### PPO, random Llama" in report
    results = {name: sections[name]["result"]["results"] for name in measured}
    assert list(results["ppo-1b"]) == ["rlhf float32"]
    (ppo,) = results["ppo-1b"]["rlhf float32"]
    assert ppo["ratio"] == pytest.approx(1.0, abs=1e-3)
    assert abs(ppo["kl"]) <= 1e-3
    for name in ("train-rm", "sft"):  # both sides start from the same adapter and take the same steps
        ours, theirs = (results[name][f"{side} float32"][0]["losses"] for side in ("rlhf", "TRL"))
        assert len(set(ours)) == 2
        assert ours == pytest.approx(theirs, abs=1e-3)
        for (side,) in results[name].values():
            assert min(side["seconds"], side["process_gb"]) > 0.0
    assert not list(tmp_path.glob("rlhf-gpu-*"))  # the models are gone


def test_a_section_that_fails_does_not_end_the_run(tmp_path):
    status, sections, report = run(tmp_path, stub(tmp_path))
    assert status == 1
    assert {name: each["status"] for name, each in sections.items() if each["status"] not in ("0", "skipped")} == {
        "sft": "3"
    }
    assert "| sft | **failed with status 3**: no such model / nowhere |" in report
    assert list(sections)[-1] == "kernels"


def test_a_section_over_its_time_ends_and_the_others_run(tmp_path):
    path = tmp_path / "timeout"
    path.write_text(TIMEOUT.format(timeout=shutil.which("timeout")), encoding="utf-8")
    path.chmod(0o755)
    status, sections, report = run(tmp_path, stub(tmp_path, ppo="sleep 600"))
    assert status == 1
    assert [sections[name]["status"] for name in ("ppo-1b", "ppo-8b", "models-8b")] == ["124", "124", "0"]
    assert "| ppo-1b | **over its time limit**: no output |" in report


def test_a_section_without_time_left_does_not_run_and_is_said(tmp_path):
    status, sections, report = run(tmp_path, stub(tmp_path), "--seconds", "4")
    assert status == 1
    assert {section["status"] for section in sections.values()} == {"out-of-time", "skipped"}
    assert "| sft | **no time left** |" in report


VLLM = ("vllm", "vllm-server", "vllm-sharded", "vllm-parallel")


def test_vllm_alone_says_what_the_machine_lacks(tmp_path):
    python = stub(tmp_path)
    real = f'    *--lacks*) exec {sys.executable} "$@" ;;\n    *find_spec*'
    python.write_text(python.read_text(encoding="utf-8").replace("    *find_spec*", real), encoding="utf-8")
    status, sections, report = run(tmp_path, python, "--vllm", "--smoke")
    assert list(sections) == ["environment", "models-1b", *VLLM]
    if importlib.util.find_spec("vllm") is None:
        assert status == 0
        assert {sections[name]["reason"] for name in VLLM} == {"vllm is not installed"}
        assert "| vllm-sharded | vllm is not installed |" in report


def test_vllm_alone_runs_all_parts_where_nothing_is_lacking(tmp_path):
    status, sections, _ = run(tmp_path, stub(tmp_path), "--vllm")
    assert status == 0
    assert [sections[name]["status"] for name in VLLM] == ["0"] * len(VLLM)
