"""The benchmarks against TRL, on tiny models: kept alive, and that both sides do the same work.

test_gpu_script.py compares adapters of reward models and of SFT; here all weights of SFT are trained, and PPO.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PEER = Path(os.environ.get("RLHF_PEER_ENV", Path.home() / ".cache" / "rlhf-bench" / "peer"))

pytestmark = pytest.mark.slow


def results(script: str, folder: Path, *arguments: object) -> dict:
    """Run a benchmark for one round; returns its results and its report."""
    file = folder / "results.json"
    common = ["--pairs", 1, "--threads", 1, "--scratch", folder, "--json", file]
    command = [sys.executable, BENCHMARKS / script, *map(str, [*arguments, *common])]
    done = subprocess.run(command, env=os.environ | {"CI": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text(encoding="utf-8"))
    assert done.stdout.strip() == found["report"].strip()
    return found


def test_sft_takes_the_same_steps_as_trls(tmp_path):
    """Both sides have the same losses, which are not the same at every step."""
    sizes = ["--steps", 3, "--batch", 4, "--micro-batch", 2, "--tokens", 8, 8]
    found = results("sft_vs_trl.py", tmp_path, "--random", "--learning-rate", 1e-2, *sizes)
    ours, theirs = (found["results"][f"{side} float32"][0] for side in ("rlhf", "TRL"))
    assert len(ours["losses"]) == 3
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-3)
    assert max(ours["losses"]) - min(ours["losses"]) > 0.01
    assert min(ours["seconds"], theirs["seconds"], ours["process_gb"], theirs["process_gb"]) > 0.0
    assert "| rlhf float32 to TRL float32 |" in found["report"]


def check_first_update(row: dict) -> None:
    """Before the first optimizer step, policy, reference and sampling policy are one."""
    assert row["ratio"] == pytest.approx(1.0, abs=1e-3)
    assert abs(row["kl"]) <= 1e-3
    assert row["seconds"] > 0.0


@pytest.mark.skipif(
    not (PEER / "installed").is_file(),
    reason="no environment with TRL 1.12.0: `benchmarks/ppo_vs_trl.py` installs one, and RLHF_PEER_ENV names it",
)
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_ppo_and_trls_start_from_the_same_policy(tmp_path, adapter):
    sizes = ["--prompt-tokens", 8, "--response-tokens", 8, "--episodes", 8, "--micro-batch", 4, "--epochs", 2]
    found = results("ppo_vs_trl.py", tmp_path, "--peer-env", PEER, "--adapter", adapter, *sizes)
    assert list(found["results"]) == ["rlhf float32", "TRL float32"]
    (ours,), (theirs,) = found["results"].values()
    check_first_update(ours)
    check_first_update(theirs)
    assert ours["first_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert theirs["first_ratio"] is None  # it logs the mean alone
    assert "trl 1.12.0" in found["report"]
