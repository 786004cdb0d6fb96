"""The `train-rm` stage, in process, and once through the real command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from rlhf_cli.data.records import Ranking
from rlhf_cli.data.splits import Split
from rlhf_cli.errors import DataError
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model.loading import load_reward_model
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.inputs import Input
from rlhf_cli.stages.reward_model import normalization
from rlhf_cli.stages.reward_model import run as train_rm
from rlhf_cli.stages.reward_model.evaluation import ranking_report
from rlhf_cli.stages.reward_model.quality import doubts
from tests.stages.context import stage_context


def write_rankings(path: Path, count: int = 30, *, answers: int = 3, extra=()) -> Path:
    """The answer with more water is better."""
    lines = [
        {
            "prompt": f"Question {number} about bread?",
            "completions": [f"{'water ' * amount}bread {number}" for amount in range(answers)],
            "ranking": [[index] for index in reversed(range(answers))],
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *extra]), encoding="utf-8")
    return path


def context_of(tmp_path: Path, model: Path, data: Path, *, holdout=0.3, label=None, max_skip=0.01, **settings):
    section = {"data": str(data), "learning_rate": 1e-2, "epochs": 6.0, "model": str(model)} | settings
    recipe = Recipe.model_validate(
        {
            "model": {"precision": "float32", "device": "cpu"},
            "data": {"holdout": holdout, "max_skip": max_skip},
            "train_rm": section,
            "label": label,
        }
    )
    for name in ("output", "work"):
        (tmp_path / name).mkdir()
    folders = {"output": tmp_path / "output", "work": tmp_path / "work"}
    return stage_context("train-rm", recipe, **folders, policy=model, rankings=data)


@pytest.mark.parametrize(
    ("model", "adapter"), [("tiny_llama", "lora"), ("tiny_llama", "none"), ("tiny_gpt2", "lora"), ("tiny_bert", "lora")]
)
def test_it_learns_and_reports_on_prompts_it_never_saw(model, adapter, request, tmp_path):
    rate = 1e-2 if adapter == "lora" else 3e-3
    folder = request.getfixturevalue(model)
    context = context_of(tmp_path, folder, write_rankings(tmp_path / "r.jsonl"), adapter=adapter, learning_rate=rate)
    outcome = train_rm.run(context)
    held_out = sum(Split(0.3, 0).holds_out(f"Question {number} about bread?") for number in range(30))
    assert outcome.metrics["rm/prompts"] == held_out
    assert outcome.metrics["rm/pairs"] == 3 * held_out
    assert outcome.metrics["rm/accuracy"] >= 0.9
    assert outcome.metrics["rm/accuracy_low"] <= outcome.metrics["rm/accuracy"] <= outcome.metrics["rm/accuracy_high"]
    assert outcome.metrics["rm/always_longer"] == 1.0
    assert outcome.metrics["rm/always_shorter"] == 0.0
    assert outcome.metrics["rm/mean_best"] > outcome.metrics["rm/mean_worst"]
    scorer = load_reward_model(ModelSource(str(context.output)), template=None)
    better, worse = scorer.score(["Question 31 about bread?"] * 2, ["water water bread 31", "bread 31"])
    assert better > worse
    assert (context.output / "metrics.jsonl").is_file()
    quality = json.loads((context.output / "quality.json").read_text())
    assert quality["verdict"] == "better than chance"
    assert quality["metrics"]["accuracy"]["value"] == outcome.metrics["rm/accuracy"]
    assert quality["metrics"]["accuracy_longer_chosen"]["count"] == 3 * held_out


@pytest.mark.parametrize(
    ("right", "prompts", "expected"),
    [
        (
            0,
            3,
            "3 held-out prompts are too few to say whether an accuracy of 0.0% is better than chance; about 100",
        ),
        (6, 12, "12 held-out prompts are too few to say whether an accuracy of 50.0% is better than chance"),
        (0, 30, "the held-out accuracy of 0.0% (0.0% to 11.6%) is below chance"),
        (100, 200, "the held-out accuracy of 50.0% (43.1% to 56.9%) is no better than chance"),
        (10, 10, None),
    ],
)
def test_an_accuracy_that_shows_nothing_is_said_to(right, prompts, expected):
    rankings = [Ranking(f"p{number}", ("better", "worse"), ((0,), (1,))) for number in range(prompts)]
    report = ranking_report(rankings, [[float(number < right), 0.5] for number in range(prompts)])
    found = doubts(report)
    assert found is None if expected is None else expected in found


def test_rewards_of_sampled_labels_have_mean_0_and_deviation_1(tiny_llama, tmp_path):
    data = write_rankings(tmp_path / "r.jsonl")
    label = {"by": "function", "function": "f.py:f"}
    context = context_of(tmp_path, tiny_llama, data, label=label)
    # As in a whole run: the rankings are what `label` sampled from the SFT model.
    (tmp_path / "manifest.json").write_text(json.dumps({"settings": {"label": label}}))
    rankings = Input("artifact", str(data), upstream="label")
    context = dataclasses.replace(context, inputs=dataclasses.replace(context.inputs, rankings=rankings))
    train_rm.run(context)
    scorer = load_reward_model(ModelSource(str(context.output)), template=None)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    train = [row for row in rows if not Split(0.3, 0).holds_out(row["prompt"])]
    rewards = [score for row in train for score in scorer.score([row["prompt"]] * 3, row["completions"])]
    mean = sum(rewards) / len(rewards)
    assert mean == pytest.approx(0.0, abs=1e-4)
    assert sum((reward - mean) ** 2 for reward in rewards) / len(rewards) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("count", [30, 110], ids=["all training rankings", "some of them"])
def test_rankings_are_scored_once_if_accuracy_and_normalization_are_about_the_same(
    tiny_bert, tmp_path, capsys, monkeypatch, count
):
    """An encoder pads, so that the bits of a reward depend on its batch: the normalization keeps its own order."""
    found, said, whole = [], [], normalization.normalize
    for name in ("once", "twice"):
        folder = tmp_path / name
        folder.mkdir()
        context = context_of(folder, tiny_bert, write_rankings(folder / "r.jsonl", count), epochs=1.0)
        if name == "twice":
            monkeypatch.setattr(normalization, "normalize", lambda *arguments: whole(*arguments[:6]))
        outcome = train_rm.run(context)
        found.append({name: value for name, value in outcome.metrics.items() if not name.startswith("time")})
        said.append(capsys.readouterr().err)
    assert found[0] == found[1], "bit for bit"
    assert [text.count("scoring training rankings: done") for text in said] == [1, 1]
    assert [text.count("normalizing rewards: done") for text in said] == [int(count == 110), 1]


def test_writing_a_reward_model_shows_how_far_it_is(tiny_llama, tmp_path, capsys):
    train_rm.run(context_of(tmp_path, tiny_llama, write_rankings(tmp_path / "r.jsonl"), normalize=False, epochs=1.0))
    said = capsys.readouterr().err
    assert "writing the reward model and comparing it: 17 parts" in said
    assert "writing the reward model and comparing it: done in " in said


def test_imported_labels_are_normalized_over_new_completions_of_the_base(tiny_llama, tmp_path, capsys):
    outcome = train_rm.run(context_of(tmp_path, tiny_llama, write_rankings(tmp_path / "r.jsonl"), epochs=1.0))
    assert "new completions of the SFT model" in capsys.readouterr().err
    assert outcome.metrics["rm/std"] > 0


def test_an_encoder_cannot_write_so_the_labeled_completions_serve(tiny_bert, tmp_path, capsys):
    train_rm.run(context_of(tmp_path, tiny_bert, write_rankings(tmp_path / "r.jsonl"), epochs=1.0))
    assert "labeled completions" in capsys.readouterr().err


def test_without_normalization_rewards_stay_raw(tiny_llama, tmp_path):
    data = write_rankings(tmp_path / "r.jsonl")
    outcome = train_rm.run(context_of(tmp_path, tiny_llama, data, normalize=False, epochs=1.0))
    assert (outcome.metrics["rm/mean"], outcome.metrics["rm/std"]) == (0.0, 1.0)


def test_preferences_are_rankings_of_two(tiny_llama, tmp_path):
    lines = [{"prompt": f"Q{n}?", "chosen": "water bread", "rejected": "bread", "margin": 1.0} for n in range(30)]
    data = tmp_path / "p.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = train_rm.run(context_of(tmp_path, tiny_llama, data, use_margin=True))
    assert outcome.metrics["rm/pairs"] == outcome.metrics["rm/prompts"]
    assert outcome.metrics["rm/accuracy"] == 1.0


def test_a_margin_that_no_record_has_is_an_error(tiny_llama, tmp_path):
    context = context_of(tmp_path, tiny_llama, write_rankings(tmp_path / "r.jsonl"), use_margin=True)
    with pytest.raises(DataError, match="no record has a `margin`"):
        train_rm.run(context)


def test_nothing_held_out_is_an_error(tiny_llama, tmp_path):
    context = context_of(tmp_path, tiny_llama, write_rankings(tmp_path / "r.jsonl"), holdout=0.0)
    with pytest.raises(DataError, match="held-out prompt"):
        train_rm.run(context)


LONG = {"prompt": "Long?", "completions": ["water " * 300, "bread"], "ranking": [[0], [1]]}


def test_a_group_with_an_answer_that_is_too_long_is_skipped_and_counted(tiny_llama, tmp_path):
    data = write_rankings(tmp_path / "r.jsonl", extra=[LONG])
    context = context_of(tmp_path, tiny_llama, data, epochs=1.0, max_skip=0.1)
    outcome = train_rm.run(context)
    assert list(outcome.skipped.values()) == [1]
    (skip,) = [json.loads(line) for line in (context.output / "skips.jsonl").read_text().splitlines()]
    assert skip["location"].endswith("r.jsonl:31")
    assert "longer than 256 tokens" in skip["reason"]


def test_too_many_skips_and_nothing_left_are_errors(tiny_llama, tmp_path):
    data = write_rankings(tmp_path / "r.jsonl", extra=[LONG])
    with pytest.raises(DataError, match="max_skip"):
        train_rm.run(context_of(tmp_path, tiny_llama, data))
    (tmp_path / "again").mkdir()
    context = context_of(tmp_path / "again", tiny_llama, data, max_length=2)
    with pytest.raises(DataError, match="none of its 31 records can be used"):
        train_rm.run(context)


def test_the_real_command(rlhf, tiny_llama, tmp_path):
    data = write_rankings(tmp_path / "r.jsonl")
    settings = [
        "--set", "train_rm.epochs=6", "--set", "train_rm.learning_rate=0.01", "--set", "data.holdout=0.3",
        "--set", "train_rm.adapter=none",
    ]  # fmt: skip
    arguments = ["train-rm", "--model", tiny_llama, "--data", data, "--run-dir", "run", "--json", *settings]
    found = json.loads(rlhf(*arguments).stdout)
    assert found["stages"][0]["metrics"]["rm/accuracy"] > 0.5
    assert json.loads(rlhf(*arguments).stdout)["stages"][0]["status"] == "cached"
