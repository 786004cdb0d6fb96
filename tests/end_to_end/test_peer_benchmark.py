"""Our side of the comparison with TRL's PPO, and its report, on a tiny model: kept alive, not measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
QUESTIONS = ("how do i grow basil?", "how do i mend a bicycle?", "what is bread made of?")


@pytest.fixture
def work(tiny_llama: Path, tmp_path: Path) -> Path:
    """What `ppo_peer.py prepare` would leave, made of the tiny model."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path / "work" / "seed0"
    shutil.copytree(tiny_llama, folder / "sft")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1).save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    held_out = [{"text": text, "ids": tokenizer(f"{text}\n").input_ids} for text in QUESTIONS]
    (folder / "prompts.json").write_text(json.dumps({"training": [], "held_out": held_out}), encoding="utf-8")
    return folder.parent


def script(name: str, *arguments: object) -> str:
    command = [sys.executable, BENCHMARKS / name, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | {"CI": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_our_side_leaves_snapshots_and_the_report_compares_them_with_the_peers(work: Path, tmp_path: Path):
    sizes = ["steps=2", "prompts_per_step=4", "epochs=1", "max_new_tokens=8", "learning_rate=1e-2"]
    script("ppo_peer.py", "ours", work, "--seeds", 0, "--kl-coefs", 0.05, "--snapshot-steps", 1, "--set", *sizes)
    ours = work / "seed0" / "ours-0.05"
    assert {"step-1.safetensors", "step-2.safetensors", "metrics.jsonl", "seconds.json"} <= {
        p.name for p in ours.iterdir()
    }
    shutil.copytree(ours, work / "seed0" / "trl-0.05")  # a peer that does the same
    table = script("ppo_peer_report.py", work, "--every", 1, "--samples", 2, "--plot", tmp_path / "curves.png")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| 0.05")
    ]
    episodes = {row[1]: row for row in rows if len(row) == 10}
    assert list(episodes) == ["0", "4", "8"]
    assert episodes["0"][6:8] == ["0.00", "0.00"]  # KL of the SFT model to itself
    assert float(episodes["8"][6]) != 0.0  # a policy that was trained; of so few answers the estimate has either sign
    assert all(row[3] == row[4] and row[6] == row[7] for row in episodes.values())
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
