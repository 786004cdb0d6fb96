"""A run with models that cannot serve ends before its first stage, and names them all."""

from __future__ import annotations

import json
import shutil

import pytest

RECIPE = """\
name: late
model: {{path: {base}}}
sft: {{data: data.jsonl}}
ppo: {{prompts: data.jsonl, reward_model: {reward_model}, steps: 1, max_new_tokens: {longest}}}
evaluate: {{policy: {policy}, judge_function: "gold.py:score", prompts: data.jsonl, trained_prompts: skip}}
data: {{holdout: 0.2}}
"""


@pytest.fixture
def write(tmp_path, tiny_llama):
    """Writes the recipe and its data."""

    def made(**given: object) -> None:
        values = {"base": tiny_llama, "policy": tiny_llama, "longest": 8} | given
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(**values))
        rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(20)]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "gold.py").write_text("def score(prompts, completions):\n    return [0.0] * len(prompts)\n")

    return made


@pytest.mark.slow
def test_misspelt_folders_are_all_named_before_the_first_stage(rlhf, write, tmp_path):
    (tmp_path / "runs" / "qa" / "train-rm").mkdir(parents=True)
    write(reward_model="runs/qa/trian-rm", policy="models/typo")
    for arguments in ((), ("--dry-run",)):
        said = rlhf("run", "recipe.yaml", *arguments, code=65).stderr
        assert (
            "runs/qa/trian-rm: no such model folder (`ppo.reward_model`) (hint: did you mean runs/qa/train-rm?)" in said
        )
        assert "models/typo: no such model folder (`evaluate.policy`)" in said
        assert "starting" not in said


@pytest.mark.slow
def test_models_that_cannot_serve_are_all_named_before_the_first_stage(rlhf, write, tmp_path, tiny_llama):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    (broken / "tokenizer.json").write_text("{")
    write(reward_model=tiny_llama, policy=broken, longest=500)
    for arguments in ((), ("--dry-run",)):
        said = rlhf("run", "recipe.yaml", *arguments, code=2).stderr
        assert f"`{tiny_llama}` has no reward head (`ppo.reward_model`)" in said
        assert f"{broken / 'tokenizer.json'} is damaged" in said
        assert "completions of 500 tokens leave no room for a prompt" in said
        assert "Traceback" not in said
        assert "starting" not in said
    assert not (tmp_path / "runs" / "late" / "sft").exists()
