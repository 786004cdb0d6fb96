"""What a stage would refuse once it has its tokenizer is refused before the first stage."""

from __future__ import annotations

import json
import re

import pytest

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


@pytest.mark.parametrize("setting", ["sampling.stop_tokens", "label.sampling.stop_tokens"])
def test_a_stop_token_of_several_tokens_is_refused(plan, setting):
    code, said = plan(0, f"{setting}=['?', 'the end of it']")
    assert code == 2, said
    assert re.search(r"`stop_tokens`: 'the end of it' is \d+ tokens of `.*tiny-llama`, expected one", said)
    assert plan(0, f"{setting}=['?']")[0] == 0
