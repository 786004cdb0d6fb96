"""The first update of PPO on the real model, epoch by epoch, as `benchmarks/ppo_trace.py` measures it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "ppo_trace.py"


@pytest.mark.real
@pytest.mark.timeout(900)
def test_the_first_epoch_is_where_it_started_and_each_epoch_goes_further(real_model: Path, shared_data: Path):
    sizes = ["--answers", "8", "--tokens", "24", "--micro-batch", "8", "--epochs", "3"]
    command = [sys.executable, SCRIPT, real_model, shared_data / "qa_prompts.jsonl", *sizes, "--json"]
    done = subprocess.run(command, env=os.environ | {"CI": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    running = json.loads(done.stdout)["running"]
    assert running["ratio"][0] == pytest.approx(1.0, abs=1e-4)
    assert running["approxkl"][0] < 1e-6
    assert running["clipfrac"][0] == 0.0
    for name in ("approxkl", "clipfrac"):
        assert all(before < after for before, after in itertools.pairwise(running[name])), (name, running[name])
    # Eight answers are learned faster than the published hundreds: above the published figure, below a runaway.
    assert 1e-3 < running["approxkl"][-1] < 1.0
