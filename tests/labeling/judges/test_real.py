"""SmolLM2-135M as a judge of real pairs, by the real command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.mark.real
def test_a_small_model_judges_and_its_report_is_honest(real_model: Path, shared_data: Path, rlhf, tmp_path: Path):
    with (shared_data / "llmbar_judge.jsonl").open() as file:
        rows = [line for line in file if len(line) < 420][:3]
    (tmp_path / "items.jsonl").write_text("".join(rows))
    panel = f"label.judge.panel=[{{model: {real_model}}}]"
    done = rlhf("label", "--by", "judge", "--items", "items.jsonl", "--set", panel, "--run-dir", "run")
    folder = tmp_path / "run" / "label"
    report = json.loads((folder / "judge.json").read_text())
    (judge,) = report["judges"]
    assert judge["questions"] == 6
    assert judge["failures"] == {}
    assert judge["says_a_letter"] > 0.5, "it understands what is asked of it, if not which answer is better"
    assert judge["known"]["accuracy"]["count"] == 3
    assert 0.0 <= judge["known"]["accuracy"]["value"] <= 1.0
    assert len((folder / "rankings.jsonl").read_text().splitlines()) == 3
    assert len((folder / "votes.jsonl").read_text().splitlines()) == 6
    assert "agreement with known order" in done.stderr
    assert str(tmp_path) not in (folder / "judge.json").read_text()
