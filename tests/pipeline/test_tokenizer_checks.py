"""What a stage would refuse once it has its tokenizer is refused before the first stage."""

from __future__ import annotations

import json
import re

import pytest

from rlhf_cli.errors import RecipeError, UsageError
from rlhf_cli.recipe.loader import LoadedRecipe
from rlhf_cli.recipe.schema import Recipe

QUESTIONS = [f"What is the capital of country {number}?" for number in range(30)]


@pytest.fixture
def plan(rlhf_here, tmp_path, tiny_llama):
    """Plans a run of labeling with prompts of which some are long; returns the exit code and what was said."""
    (tmp_path / "rate.py").write_text("def score(prompts, completions):\n    return [0.0 for _ in completions]\n")

    def run(long: int, *settings: str):
        texts = [text + " Why?" * (80 if number < long else 0) for number, text in enumerate(QUESTIONS)]
        (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        given = ["--model", tiny_llama, "--prompts", "p.jsonl", "--function", "rate.py:score", "--dry-run"]
        sets = [part for one in ("data.max_prompt_tokens=60", *settings) for part in ("--set", one)]
        return rlhf_here("label", *given, *sets)

    return run


def test_too_many_long_prompts_are_refused_before_anything_runs(plan):
    code, said = plan(30)
    assert code == 65
    assert "p.jsonl: none of its 30 records can be used (30 prompt longer than 60 tokens)" in said
    assert "hint: shorten the prompts, or raise `data.max_prompt_tokens`" in said
    code, said = plan(3)
    assert code == 65
    assert "p.jsonl: 3 of 30 records (10.00%) would be skipped" in said


@pytest.mark.parametrize(("long", "setting"), [(0, "seed=0"), (3, "data.max_skip=0.11")])
def test_few_long_prompts_are_skipped_by_the_stage(plan, long, setting):
    code, said = plan(long, setting)
    assert code == 0, said


def test_the_hint_works(plan):
    assert plan(30, "data.max_prompt_tokens=400", "sampling.max_new_tokens=8")[0] == 0


def test_layers_of_an_adapter_that_do_not_exist_are_named(rlhf_here, tmp_path, tiny_llama):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Why?", "chosen": "So.", "rejected": "No."}\n' * 4)
    arguments = ("train-rm", "--model", tiny_llama, "--data", "pairs.jsonl", "--dry-run", "--set")
    code, said = rlhf_here(*arguments, "train_rm.lora.target_modules=[nope_proj]")
    assert code == 65, said
    assert "`train_rm`: `lora.target_modules`: LlamaModel has no linear layer `nope_proj`" in said
    assert "hint: its linear layers are: down_proj, gate_proj" in said
    assert rlhf_here(*arguments, "train_rm.lora.target_modules=[q_proj, down_proj]")[0] == 0


STOPS = "['?', 'the end of it']"


@pytest.mark.parametrize("setting", ["sampling.stop_tokens", "label.sampling.stop_tokens"])
def test_a_stop_token_of_several_tokens_is_refused(plan, setting):
    code, said = plan(0, f"{setting}={STOPS}")
    assert code == 2, said
    where = re.escape(f"error: --set {setting}={STOPS}: `{setting}`: ")
    assert re.search(rf"{where}'the end of it' is \d+ tokens of `.*tiny-llama`, expected one", said)
    assert plan(0, f"{setting}=['?']")[0] == 0


@pytest.mark.parametrize("command", [("run",), ("run", "--dry-run"), ("plan",), ("label",)])
def test_a_refused_setting_is_shown_with_its_line_and_one_exit_code(rlhf_here, tmp_path, tiny_llama, command):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    (tmp_path / "rate.py").write_text("def score(prompts, completions):\n    return [0.0 for _ in completions]\n")
    (tmp_path / "r.yaml").write_text(
        f"model: {{path: {tiny_llama}}}\ndata: {{prompts: p.jsonl}}\nsampling:\n  max_new_tokens: 8\n"
        f"  stop_tokens: {STOPS}\nlabel: {{by: function, function: rate.py:score}}\ntrain_rm: {{}}\nppo: {{}}\n"
    )
    name, *options = command
    code, said = rlhf_here(name, "r.yaml", *options)
    assert code == 2, said
    assert "error: r.yaml:5: `sampling.stop_tokens`: 'the end of it' is " in said


def test_a_setting_that_a_stage_refuses_is_located_too():
    origins = {("ppo",): "r.yaml:1", ("ppo", "stop_tokens"): "r.yaml:2"}
    loaded = LoadedRecipe(Recipe.model_validate({"ppo": {"stop_tokens": ["a b"]}}), None, origins)
    with pytest.raises(RecipeError, match=r"^r\.yaml:2: `ppo\.stop_tokens`: bad$"), loaded.locating():
        raise UsageError("`stop_tokens`: bad", setting="stop_tokens", value="a b")
    with pytest.raises(UsageError, match=r"^`stop_tokens`: bad$"), loaded.locating():  # of the model's folder
        raise UsageError("`stop_tokens`: bad", setting="stop_tokens", value="c d")
