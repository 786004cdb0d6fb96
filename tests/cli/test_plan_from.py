"""`rlhf plan --from`: what earlier stages have not written is taken to be as the recipe makes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.models.gpus import Cluster
from rlhf_cli.models.model_sizes import SIZES
from rlhf_cli.pipeline.plan import plan_run
from rlhf_cli.pipeline.plan_target import Target
from rlhf_cli.pipeline.run_plan import StagePlan
from rlhf_cli.pipeline.runner import dry_run
from rlhf_cli.pipeline.selection import Selection
from rlhf_cli.recipe.loader import load_recipe

TARGETS = {"here": None, "8b": Target(Cluster.of("h100", 8), SIZES["8b"])}
READ = {
    "label": "`sft`",
    "train-rm": "`label`, `sft`",
    "ppo": "`sft`, `train-rm`",
    "evaluate": "`ppo`, `sft`, `train-rm`",
}
"""Stage -> those whose output it reads."""


@pytest.fixture(params=["build", "path"])
def whole(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path) -> Path:
    """A recipe of all stages, of which none has run; its base model is made by `sft`, or there already."""
    rows = [{"prompt": f"Why {number}?", "completion": " Because it is warm."} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "f.py").write_text("def f(prompts, completions): return [0.0] * len(completions)\n")
    model = f"path: {tiny_llama}" if request.param == "path" else "build: {hidden_size: 32, layers: 1, heads: 2}"
    recipe = tmp_path / "whole.yaml"
    recipe.write_text(
        f"name: whole\nmodel: {{{model}, precision: float32, device: cpu}}\n"
        "data: {prompts: rows.jsonl, holdout: 0.3}\nsampling: {max_new_tokens: 4}\n"
        "sft: {data: rows.jsonl}\nlabel: {by: function, function: 'f.py:f', completions_per_prompt: 2}\n"
        "train_rm: {adapter: none}\nppo: {steps: 2, prompts_per_step: 4, adapter: none}\nevaluate: {}\n"
    )
    return recipe


def plain(stage: StagePlan) -> StagePlan:
    """Return a plan without the notes, and without the reason, which names the stages before it."""
    assert stage.workload is not None
    return replace(stage, workload=replace(stage.workload, notes=()), reason="")


@pytest.mark.parametrize("target", TARGETS)
def test_a_plan_from_a_stage_is_that_part_of_the_whole_plan(target, whole: Path):
    loaded, folder = load_recipe(whole, []), whole.parent / "run"

    def planned(first: str | None) -> list[StagePlan]:
        return plan_run(loaded, folder, Selection(first), trial=False, target=TARGETS[target]).stages

    every = planned(None)
    for first, read in READ.items():
        stages = planned(first)
        assert list(map(plain, stages)) == list(map(plain, every[-len(stages) :]))
        assert stages[0].workload is not None
        assert (
            f"not there yet, and taken to be as this recipe makes it: the output of {read}" in stages[0].workload.notes
        )
    assert not any("not there yet" in note for stage in every if stage.workload for note in stage.workload.notes)
    assert not folder.exists()


def test_what_no_stage_of_the_recipe_writes_is_still_missing(whole: Path):
    loaded = load_recipe(whole, ["train_rm=null", "label=null"])
    with pytest.raises(UsageError, match="no reward model in"):
        plan_run(loaded, whole.parent / "run", Selection("ppo"), trial=False)


def test_a_run_assumes_nothing(whole: Path):
    with pytest.raises(UsageError, match="no SFT model in"):
        dry_run(load_recipe(whole, []), whole.parent / "run", Selection("ppo"))
