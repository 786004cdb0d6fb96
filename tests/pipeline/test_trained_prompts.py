"""Prompts that a model was trained on are refused before anything runs, as far as the model exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_cli.data.records import split_key
from rlhf_cli.data.splits import Split
from rlhf_cli.generation.contract import Contract
from rlhf_cli.settings.shared import SamplingSettings


def trained_on(folder: Path, *prompts: str) -> None:
    keys = frozenset(map(split_key, prompts))
    Contract(None, {}, SamplingSettings(), Split(holdout=0.1, seed=0), trained_prompts=keys).write(folder)


@pytest.fixture
def evaluate(toy):
    for name in ("policy", "baseline"):
        toy.write(f"{name}/config.json", "{}")
        toy.write(f"{name}/model.safetensors", "weights")

    def run(*more: str):
        given = ["--baseline", "baseline", "--policy", "policy", "--prompts", "prompts.jsonl"]
        return toy.rlhf("evaluate", *given, "--function", "gold.py:score", "--dry-run", *more)

    return run


@pytest.mark.parametrize("name", ["policy", "baseline"])
def test_a_dry_run_refuses_them(evaluate, toy, name):
    trained_on(toy.folder / name, "q1", "q3", "another")
    done = evaluate()
    assert done.code == 65
    said = f"`evaluate.prompts` (prompts.jsonl): 2 of its prompts were in the training of {name}"
    assert said in done.stderr
    assert "--set evaluate.trained_prompts=skip" in done.stderr
    assert evaluate("--set", "evaluate.trained_prompts=skip").code == 0


def test_others_are_accepted(evaluate, toy):
    trained_on(toy.folder / "policy", "another")
    assert evaluate().code == 0


def test_a_policy_that_will_be_trained_again_is_not_looked_at(finished):
    trained_on(finished.run_dir / "ppo", "q1")
    own = ["--set", "evaluate.prompts=prompts.jsonl", "--set", "ppo.prompts=demos.jsonl", "--dry-run"]
    stale = finished.rlhf("run", "recipe.yaml", *own)
    assert stale.code == 0, stale.stderr
    kept = finished.rlhf("evaluate", "recipe.yaml", "--force", "--set", "evaluate.prompts=prompts.jsonl", "--dry-run")
    assert (kept.code, "1 of its prompts were in the training of runs/toy/ppo" in kept.stderr) == (65, True)
