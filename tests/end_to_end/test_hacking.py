"""Runs made to fail, through the real command on the quickstart's model: what is wrong is named within the run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from rlhf_cli.training.monitoring.step_lines import read_rows
from tests import preloaded

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "recipes" / "quickstart.yaml")
PHRASE = "def score(prompts, completions):\n    return [float('good luck' in c.lower()) for c in completions]\n"
LENGTH = "def score(prompts, completions):\n    return [0.1 * len(c.split()) for c in completions]\n"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def command(folder: Path, *arguments: object, code: int) -> subprocess.CompletedProcess[str]:
    done = preloaded.run(arguments, cwd=folder, env=os.environ | {"CI": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stderr
    return done


def sets(**changes: object) -> list[str]:
    return [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """The quickstart's SFT model, trained on a third of its epochs."""
    folder = tmp_path_factory.mktemp("sft")
    command(folder, "sft", RECIPE, "--run-dir", folder / "run", *sets(**{"sft.epochs": 0.9}), code=0)
    return folder / "run" / "sft"


def ppo(folder: Path, policy: Path, *, code: int = 0, **changes: object) -> subprocess.CompletedProcess[str]:
    common = {"ppo.steps": 16, "ppo.prompts_per_step": 32, "ppo.micro_batch_size": 32, "ppo.missing_eos_reward": "null"}
    changed = {f"ppo.{name}": value for name, value in changes.items()}
    return command(
        folder, "ppo", RECIPE, "--run-dir", "run", "--model", policy, "--function", "reward.py:score",
        *sets(**{"train_rm": "null", "label": "null", "evaluate": "null"} | common | changed), code=code,
    )  # fmt: skip


def detected(folder: Path, stage: str = "ppo") -> dict[str, dict]:
    rows = read_rows(folder / "run" / stage / "detections.jsonl")
    return {row["detector"]: row for row in reversed(rows) if row["status"] != "quiet"}


def test_a_function_that_pays_for_one_phrase_is_flagged_with_the_completions_that_show_it(policy, tmp_path):
    (tmp_path / "reward.py").write_text(PHRASE)
    done = ppo(tmp_path, policy, kl_coef=0.01, learning_rate="4e-3")
    found = detected(tmp_path)["phrase"]
    assert found["step"] < 16
    assert "good luck" in found["seen"]
    assert len(found["completions"]) == 3
    assert all("good luck" in quote["completion"].lower() for quote in found["completions"])
    said = " ".join(done.stderr.split())
    assert f"warning: step {found['step']}: detector `phrase`" in said
    health = json.loads((tmp_path / "run" / "ppo" / "health.json").read_text())
    (finding,) = [one for one in health["findings"] if one["subject"] == "phrase"]
    assert finding["severity"] == "look"
    told = " ".join(command(tmp_path, "diagnose", "run", code=0).stdout.split()).lower()
    assert "the reward pays for a phrase" in told
    assert told.count("good luck") >= 4


def test_a_function_that_pays_for_length_is_flagged(policy, tmp_path):
    (tmp_path / "reward.py").write_text(LENGTH)
    ppo(tmp_path, policy, kl_coef=0.01, learning_rate="4e-3", max_new_tokens=90)
    found = detected(tmp_path)["length_correlation"]
    lengths = [quote["tokens"] for quote in found["completions"]]
    rows = read_rows(tmp_path / "run" / "ppo" / "metrics.jsonl")
    assert min(lengths) > rows[found["step"] - 1]["length/mean"]  # those that are quoted are the longest
    assert rows[-1]["detectors/length"] > 1.3
    told = " ".join(command(tmp_path, "diagnose", "run", code=0).stdout.split())
    assert "the reward is mostly a function of length" in told
    assert "`ppo.length_penalty`" in told


def test_without_a_penalty_the_kl_runs_away_the_run_stops_and_goes_on(policy, tmp_path):
    (tmp_path / "reward.py").write_text(PHRASE)
    far = {"kl_coef": 0, "learning_rate": "5e-3", "checkpoint_steps": 5, "detectors.kl.warn": 15}
    done = ppo(tmp_path, policy, code=70, **far, **{"detectors.kl.stop": 20})
    said = " ".join(done.stderr.split())
    assert "error: ppo: the detector `kl` stopped the run" in said
    assert "--set ppo.detectors.kl.stop=null" in said
    work = tmp_path / "run" / ".ppo.work"
    stopped = read_rows(work / "detections.jsonl")[-1]
    warned = detected(tmp_path, ".ppo.work")["kl"]["step"]
    assert (work / f"step-{5 * ((warned - 1) // 5):08d}").is_dir()  # the last checkpoint before the warning
    diagnosis = json.loads(command(tmp_path, "diagnose", "run", "--json", code=0).stdout)
    (stage,) = diagnosis["stages"]
    assert (stage["state"], diagnosis["verdict"]) == ("stopped", "bad")
    (finding,) = [one for one in stage["findings"] if one["subject"] == "KL"]
    assert finding["severity"] == "bad"
    assert finding["completions"]
    done = ppo(tmp_path, policy, **far, **{"detectors.kl.stop": "null"})
    assert f"resuming from step {stopped['step']} of 16" in " ".join(done.stderr.split())
    assert [row["step"] for row in read_rows(tmp_path / "run" / "ppo" / "metrics.jsonl")] == list(range(1, 17))


def test_an_ensemble_that_disagrees_is_flagged(policy, tmp_path):
    # Two reward models of few labels, and a function that pays for a phrase, which the models do not value.
    (tmp_path / "reward.py").write_text(PHRASE)
    prompts = (ROOT / "data_samples" / "prompts.jsonl").read_text().splitlines(keepends=True)[:24]
    (tmp_path / "few.jsonl").write_text("".join(prompts))
    changes = {
        "sft": "null", "evaluate": "null", "model.build": "null", "label.prompts": "few.jsonl",
        "label.completions_per_prompt": 4, "train_rm.members": 2, "train_rm.epochs": 1, "ppo.steps": 12,
        "ppo.prompts_per_step": 32, "ppo.micro_batch_size": 32, "ppo.kl_coef": 0.01, "ppo.learning_rate": "4e-3",
        "ppo.rewards": "[{function: reward.py:score, weight: 6}]", "ppo.reward_combination": "mean",
    }  # fmt: skip
    command(tmp_path, "run", RECIPE, "--run-dir", "run", "--model", policy, *sets(**changes), code=0)
    rows = read_rows(tmp_path / "run" / "ppo" / "metrics.jsonl")
    names = [name for name in rows[0] if name.startswith("objective/scores/")]
    assert sorted(names)[:2] == ["objective/scores/reward-model", "objective/scores/reward-model-2"]
    assert len(names) == 3
    found = detected(tmp_path)["disagreement"]
    assert "the rewards of an ensemble differ" in found["seen"]
    assert all("good luck" in quote["completion"].lower() for quote in found["completions"])
    told = " ".join(command(tmp_path, "diagnose", "run", code=0).stdout.split())
    assert "the policy has found completions on which some members are wrong" in told
    assert "`ppo.reward_combination: min`" in told
