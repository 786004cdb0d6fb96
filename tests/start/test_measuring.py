"""The lengths of completions that `rlhf start` measures, or why it does not."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from rlhf_cli.errors import ModelError
from rlhf_cli.recipe.loader import load_recipe
from rlhf_cli.start import measuring
from rlhf_cli.start.lengths import Lengths
from rlhf_cli.start.measuring import sample_lengths, with_lengths
from rlhf_cli.start.writing import write_recipe
from tests.start.conftest import said


def test_completions_of_a_few_prompts_are_sampled_to_their_end(draft, capsys):
    made = draft()
    assert len(made.prompts.sample) == 10, "of 30 prompts, every third"
    found = sample_lengths(made.model, made.prompts.sample, 40, ())
    assert found is not None
    assert found.count == 10
    assert all(1 <= length <= 40 for length in found.ended)
    assert "sampling completions: 10 completions" in said(capsys), "on a terminal, a bar"
    assert found == sample_lengths(made.model, made.prompts.sample, 40, ()), "the seeds are fixed"


def test_sampling_ends_when_its_time_is_up(draft):
    made = draft()
    found = sample_lengths(made.model, made.prompts.sample, 200, (), seconds=-1.0)
    assert (found.count, found.is_guess, found.sampled) == (4, True, 1)


def test_the_last_completion_may_end_when_the_time_is_up(draft, monkeypatch):
    def generate(self, policy, requests, *, progress):
        progress(0, len(requests))
        progress(len(requests), len(requests), [2] * len(requests))

    monkeypatch.setattr("rlhf_cli.generation.torch_generator.TorchGenerator.generate", generate)
    clock = iter([1.0, 2.0, 1.0, 101.0])  # to time a token, then to sample
    monkeypatch.setattr(measuring, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    made = draft()
    assert sample_lengths(made.model, made.prompts.sample, 4, ()) == Lengths([2] * 10)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyboardInterrupt(), "sampling them was skipped"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory of this machine did not suffice"),
        (MemoryError(), "memory of this machine did not suffice"),
    ],
)
def test_ctrl_c_and_too_little_memory_keep_the_answers(draft, capsys, monkeypatch, error, reason):
    def fail(*_):
        raise error

    monkeypatch.setattr("rlhf_cli.start.measuring.sample_lengths", fail)
    made = draft()
    assert with_lengths(made) == made
    assert reason in said(capsys)


def test_a_defect_is_no_reason_to_go_on(draft, monkeypatch):
    monkeypatch.setattr("rlhf_cli.start.measuring.sample_lengths", lambda *_: {}["absent"])
    with pytest.raises(KeyError):
        with_lengths(draft())


def test_a_slow_machine_samples_fewer_prompts(draft, monkeypatch):
    made = draft()
    clock = iter(range(10_000))
    monkeypatch.setattr(measuring, "time", SimpleNamespace(monotonic=lambda: next(clock)))  # a second per token
    assert sample_lengths(made.model, made.prompts.sample, 30, (), seconds=20.0).count == 4
    assert sample_lengths(made.model, made.prompts.sample, 30, (), seconds=40.0).count == 10


def test_the_recipe_holds_a_limit_within_which_most_completions_end(draft, tmp_path, capsys, monkeypatch):
    def sampled(*_) -> Lengths:
        return Lengths([60, 70, 80, 90, 100, 110, 120, 130, 140, 150])

    monkeypatch.setattr("rlhf_cli.start.measuring.sample_lengths", sampled)
    made = with_lengths(draft())
    assert "limit of a completion: 96 tokens" not in said(capsys)
    assert made.max_new_tokens() == min(192, made.most_new_tokens)
    write_recipe(made, tmp_path / "mine.yaml", "rlhf start")
    text = (tmp_path / "mine.yaml").read_text()
    assert load_recipe(tmp_path / "mine.yaml").recipe.sampling.max_new_tokens == made.max_new_tokens()
    assert "in all stages; about " in text


def test_lengths_of_demonstrations_count_where_the_model_learns_them(draft, tmp_path, capsys, monkeypatch):
    rows = [{"prompt": f"Question {n}?", "completion": "word " * (5 + n)} for n in range(20)]
    path = tmp_path / "shown.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("rlhf_cli.start.measuring.sample_lengths", None)  # is not called
    made = with_lengths(draft(demonstrations=str(path)))
    assert "of 20 demonstrations are cut off" in said(capsys)
    assert made.lengths.share_ended(made.max_new_tokens()) >= 0.75


@pytest.mark.parametrize(
    "setting", ["sampling.max_new_tokens=17", "sampling.max_new_tokens=1.7e1", "sampling={max_new_tokens: 17}"]
)
def test_a_limit_that_the_user_gave_stays_and_its_cost_is_said(draft, tmp_path, capsys, monkeypatch, setting):
    most = []

    def sampled(_model, _prompts, longest, _settings) -> Lengths:
        most.append(longest)
        return Lengths([10, 30], running=10, sampled=longest)

    monkeypatch.setattr("rlhf_cli.start.measuring.sample_lengths", sampled)
    made = with_lengths(draft(setting))
    assert most == [34], "to say what twice the limit cuts off"
    text = said(capsys)
    assert "limit of a completion: 17 tokens; 92% of 12 sampled completions are cut off" in text
    assert "a limit of 34 would cut off about 83%" in text
    assert "judge only how they begin: raise `sampling.max_new_tokens`, or ask for short replies" in text
    write_recipe(made, tmp_path / "mine.yaml", "rlhf start")
    assert load_recipe(tmp_path / "mine.yaml").recipe.sampling.max_new_tokens == 17
    assert "about 92% are cut off" in (tmp_path / "mine.yaml").read_text()


def test_limits_of_single_stages_are_judged_too(draft, capsys, monkeypatch):
    ends = [20] * 9 + [200]
    monkeypatch.setattr("rlhf_cli.start.measuring.sample_lengths", lambda *_: Lengths(ends))
    with_lengths(draft("ppo.max_new_tokens=1e1", "label.sampling={max_new_tokens: 20}"))
    text = said(capsys)
    assert "`ppo.max_new_tokens: 10`; 100% of 10 sampled completions are cut off" in text
    assert "`label.sampling.max_new_tokens: 20`; 10% of 10 sampled completions are cut off" in text
    assert "judge only how they begin: raise `ppo.max_new_tokens`, or" in text


def test_a_limit_that_leaves_the_value_open_is_the_default(draft, monkeypatch):
    assert draft("sampling.max_new_tokens=null").max_new_tokens() == 128
    assert draft("sampling.temperature=1").given_limit is None
    assert draft("sampling.max_new_tokens=true").given_limit is None, "the recipe refuses it"
    assert draft("sampling.max_new_tokens=9", "sampling.max_new_tokens=null").max_new_tokens() == 128


def test_a_model_that_does_not_end_is_told(draft, capsys, monkeypatch):
    monkeypatch.setattr("rlhf_cli.start.measuring.sample_lengths", lambda *_: Lengths([], 12, 1024))
    made = with_lengths(draft())
    text = said(capsys)
    limit = min(256, made.most_new_tokens)
    assert made.max_new_tokens() == limit
    assert f"limit of a completion: {limit} tokens; 100% of 12 sampled completions are cut off" in text
    assert "warning: this model ends few of its completions" in text


@pytest.mark.parametrize("reason", ["not on this machine yet", "large for the memory", "broken"])
def test_what_cannot_be_measured_is_said_and_the_recipe_is_written(draft, capsys, monkeypatch, tmp_path, reason):
    def fail(*_):
        raise ModelError("broken")

    monkeypatch.setattr("rlhf_cli.start.measuring.sample_lengths", fail)
    weights = {"not on this machine yet": None, "large for the memory": 10**13}
    made = draft()
    made = replace(made, model=replace(made.model, weights=weights.get(reason, made.model.weights)))
    found = with_lengths(made)
    text = said(capsys)
    assert found.max_new_tokens() == min(256, made.most_new_tokens)
    assert reason in text
    assert "raise `sampling.max_new_tokens` in the recipe" in text
