"""What the `ppo` stage reads: prompts to train on, held-out prompts, demonstrations for PPO-ptx."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cli.data.splits import Split, validation_prompts
from rlhf_cli.errors import DataError
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.loading import ModelSource, load_tokenizer
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.ppo.data import load_data
from rlhf_cli.stages.ppo.rollout import own_sampling
from tests.stages.context import stage_context

TEXTS = [f"Question number {number}?" for number in range(40)]


@pytest.fixture
def load(tiny_llama: Path, tmp_path: Path):
    """`load(ppo settings, holdout=...)` gives what the stage would read."""
    prompts, demonstrations = tmp_path / "prompts.jsonl", tmp_path / "demonstrations.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    rows = [{"prompt": text, "completion": " yes" * (1 + number % 3)} for number, text in enumerate(TEXTS)]
    demonstrations.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(holdout=0.25, **settings):
        recipe = Recipe.model_validate({"data": {"holdout": holdout, "max_skip": 0.9}, "ppo": settings})
        inputs = {"policy": tiny_llama, "prompts": prompts, "demonstrations": demonstrations}
        context = stage_context("ppo", recipe, output=tmp_path, work=tmp_path, **inputs)
        assert recipe.ppo is not None
        return load_data(context, Policy.load(ModelSource(str(tiny_llama)), Sampling.resolve(own_sampling(recipe.ppo))))

    return run


def test_nothing_held_out_is_trained_on(load, tiny_llama):
    data, _ = load(eval_steps=5, eval_prompts=3)
    assert len(data.prompts) + sum(Split(0.25, 0).holds_out(text) for text in TEXTS) == 40
    assert not any(Split(0.25, 0).holds_out(text) for text in data.prompts.prompts)
    assert len(data.held_out) == 3
    assert all(Split(0.25, 0).holds_out(text) for text in data.held_out.prompts)
    tokenizer = load_tokenizer(ModelSource(str(tiny_llama)))
    assert data.held_out.ids[0] == tokenizer(data.held_out.prompts[0]).input_ids


def test_no_more_than_half_of_what_is_held_out_is_looked_at():
    held_out = [f"prompt {number}" for number in range(7)]
    chosen = validation_prompts(held_out, 100, seed=3)
    assert len(chosen) == 3
    assert validation_prompts(held_out, 2, seed=3) == chosen[:2]
    assert validation_prompts(reversed(held_out), 100, seed=3) == chosen
    assert validation_prompts(held_out, 100, seed=4) != chosen
    assert validation_prompts([], 5, seed=3) == []


def test_evaluating_without_held_out_prompts_is_an_error(load):
    with pytest.raises(DataError, match="needs two held-out prompts"):
        load(holdout=0.0, eval_steps=5)
    data, _ = load(holdout=0.0, show_steps=5, shown_prompts=2)
    assert data.held_out.prompts == TEXTS[:2]
    assert load(holdout=0.25)[0].held_out is None


def test_demonstrations_for_ptx_are_not_held_out_and_fit(load):
    whole, none = load(ptx={})
    kept = sum(not Split(0.25, 0).holds_out(text) for text in TEXTS)
    assert (len(whole.demonstrations), none.total) == (kept, 0)
    sizes = [
        len(p) + len(c)
        for p, c in zip(whole.demonstrations.prompt_ids, whole.demonstrations.completion_ids, strict=True)
    ]
    room = sorted(sizes)[kept // 2]
    data, skips = load(ptx={"max_length": room})
    assert len(data.demonstrations) == sum(size <= room for size in sizes) < kept
    assert skips.counts == {f"demonstration longer than {room} tokens": kept - len(data.demonstrations)}
    assert load()[0].demonstrations is None


def test_evaluation_leaves_out_prompts_that_chose_the_policy(tmp_path, capsys):
    from rlhf_cli.data.records import PromptRecord, prompt_key
    from rlhf_cli.stages.evaluate.prompts import not_chosen_on

    records = [PromptRecord(text) for text in TEXTS[:5]]
    assert not_chosen_on(records, tmp_path) == records
    (tmp_path / "chosen_on.json").write_text(json.dumps([prompt_key(TEXTS[1]), prompt_key(TEXTS[30])]))
    assert [record.prompt for record in not_chosen_on(records, tmp_path)] == [TEXTS[n] for n in (0, 2, 3, 4)]
    assert "1 prompts were used to select the policy" in " ".join(capsys.readouterr().err.split())
