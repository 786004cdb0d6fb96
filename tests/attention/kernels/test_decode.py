"""The decode kernels: their values in Triton's interpreter, and their machine code for Hopper."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_every_case_passes_in_the_interpreter():
    cases = Path(__file__).with_name("decode_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_the_machine_code_for_hopper_spills_nothing():
    names = [
        "64:shared", "128:lone", "128:many:bfloat16:window,softcap", "256:shared:float16:sinks",
        "256:many:float32:window,softcap,sinks",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_decode_sm90.py")
    done = subprocess.run([sys.executable, script, *names], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * len(names)
    for facts in found:
        assert (facts["stack"], facts["spill_stores"], facts["spill_loads"]) == (0, 0, 0), facts
        uses_tensor_cores = facts["hmma"] + facts["hgmma"] > 0
        assert uses_tensor_cores == (facts["kernel"] == "partial_kernel" and "float32" not in facts["name"]), facts
        assert facts["shared"] <= 227 * 1024
