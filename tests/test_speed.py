"""The plugin of slow tests: who is marked, who fails, and what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = """\
import subprocess, sys
import pytest

def start():
    subprocess.run([sys.executable, "-c", ""], check=True)

def test_of_arithmetic():
    assert 1 + 1 == 2

def test_that_starts_a_process_unmarked():
    start()

@pytest.mark.slow
def test_that_starts_a_process_marked():
    start()

def test_with_the_fixture(rlhf):
    start()
"""
FIXTURE = """\
import pytest

@pytest.fixture
def rlhf():
    pass
"""


def run_pytest(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.speed", "-p", "no:xdist", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False).stdout


@pytest.mark.slow
def test_a_test_that_starts_a_process_must_be_marked_and_folders_are_timed(tmp_path: Path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"test_{folder}.py").write_text(TESTS)
        (tmp_path / folder / "conftest.py").write_text(FIXTURE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: x\naddopts = -p no:cacheprovider\n")
    everything = run_pytest(tmp_path)
    assert "2 failed, 6 passed" in everything
    assert everything.count("mark it `@pytest.mark.slow`") >= 2
    assert "FAILED one/test_one.py::test_that_starts_a_process_unmarked" in everything
    report = everything.partition("seconds per folder")[2].splitlines()
    assert sorted(line.split()[-1] for line in report[1:3]) == ["one", "two"]
    assert all(" 4 tests" in line for line in report[1:3])
    assert "2 failed, 2 passed, 4 deselected" in run_pytest(tmp_path, "-m", "not slow"), "the fixture marks its tests"
