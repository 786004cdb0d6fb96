"""The recipe on human rankings, on the real model and data, by the short call its first lines document."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "qa-human.yaml"


def short_settings() -> list[str]:
    """The `--set` arguments of the short variant, read from the recipe's own comment."""
    comment = [line.lstrip("# ") for line in RECIPE.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    words = " ".join(comment).replace("\\", " ").split("...", 1)[1].split()
    return [part for flag, value in itertools.pairwise(words) if flag == "--set" for part in (flag, value)]


def test_the_comment_names_a_short_variant():
    assert len(short_settings()) >= 10


@pytest.fixture
def data(shared_data: Path, tmp_path: Path) -> Path:
    """A folder with the first 120 records of each file: 3 or 4 held-out prompts, whose figures are not the subject."""
    for name in ("demonstrations", "rankings", "prompts"):
        with (shared_data / f"qa_{name}.jsonl").open(encoding="utf-8") as lines:
            (tmp_path / f"{name}.jsonl").write_text("".join(itertools.islice(lines, 120)), encoding="utf-8")
    return tmp_path


@pytest.mark.real
@pytest.mark.timeout(900)
def test_the_short_variant_runs_whole(real_model: Path, data: Path, tmp_path: Path):
    arguments = [
        *("run", RECIPE, "--model", real_model, "--prompts", data / "prompts.jsonl", "--run-dir", tmp_path / "run"),
        *("--set", f"sft.data={data / 'demonstrations.jsonl'}", "--set", f"label.data={data / 'rankings.jsonl'}"),
        *("--set", "model.threads=1", "--json"),
    ]
    command = [str(Path(sys.executable).with_name("rlhf")), *map(str, arguments), *short_settings()]
    result = subprocess.run(command, env=os.environ | {"CI": "1"}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    stages = {row["name"]: row["metrics"] for row in json.loads(result.stdout)["stages"]}
    assert stages["ppo"]["objective/kl"] == pytest.approx(0.0, abs=1.0)
    assert 0.0 < stages["train-rm"]["rm/accuracy"] < 1.0
    assert {"reward/difference", "reward/difference_se", "kl_nats"} <= stages["evaluate"].keys()
    assert "Traceback" not in result.stderr
