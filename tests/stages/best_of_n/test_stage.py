"""The `best-of-n` stage: every number from the samples it wrote, other rewards of the same samples, and resuming."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
from pydantic import ValidationError

from rlhf_cli.data.splits import Split
from rlhf_cli.errors import DataError, Interrupted
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.base import StageContext
from rlhf_cli.stages.best_of_n import run as best_of_n
from rlhf_cli.stages.best_of_n.samples import SampleRow, read_samples
from rlhf_cli.statistics.best_of_n import kl_bound
from tests.stages.context import stage_context
from tests.stops import StopAtCheck

CODE = """
def count_e(prompts, completions):
    return [float(text.count("e")) for text in completions]


def length(prompts, completions):
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "rate.py").write_text(CODE)
    return str(tmp_path / "rate.py")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(24)))
    return path


def context_of(folder: Path, inputs: dict, *, stop=None, holdout=0.4, **settings) -> StageContext:
    section = {} if "samples" in settings else {"sampling": {"max_new_tokens": 8, "batch_size": 8}}
    recipe = Recipe.model_validate(
        {
            "model": {"precision": "float32", "device": "cpu"},
            "data": {"holdout": holdout, "prompt_template": None},
            "best_of_n": section | settings,
        }
    )
    for name in ("output", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return stage_context(
        "best-of-n", recipe, output=folder / "output", work=folder / "work", stop=stop,
        **{name: str(value) for name, value in inputs.items()},
    )  # fmt: skip


def by_function(tmp_path, tiny_llama, source, code, **settings) -> StageContext:
    inputs = {
        "policy": tiny_llama,
        "prompts": source,
        "function": f"{code}:count_e",
        "gold_function": f"{code}:length",
    }
    given = {"function": f"{code}:count_e", "gold_function": f"{code}:length", "samples_per_prompt": 6}
    return context_of(tmp_path / "stage", inputs, **(given | settings))


def lines(context: StageContext, name: str = "samples.jsonl") -> list[dict]:
    return [json.loads(line) for line in (context.output / name).read_text().splitlines()]


def over_subsets(row: dict, n: int) -> float:
    """Mean gold score of the best of all sets of n completions; ties count the mean."""
    found = []
    for chosen in combinations(range(len(row["rewards"])), n):
        best = max(row["rewards"][i] for i in chosen)
        tied = [row["gold"][i] for i in chosen if row["rewards"][i] == best]
        found.append(sum(tied) / len(tied))
    return sum(found) / len(found)


def test_every_number_follows_from_the_samples_of_held_out_prompts(tiny_llama, prompts, code, tmp_path, capsys):
    context = by_function(tmp_path, tiny_llama, prompts, code)
    outcome = best_of_n.run(context)
    rows = lines(context)
    assert {row["prompt"] for row in rows} == {p for n in range(24) if Split(0.4, 0).holds_out(p := f"Question {n}?")}
    for row in rows:
        assert len(row["completions"]) == 6
        assert row["rewards"] == [text.count("e") for text in row["completions"]]
        assert row["gold"] == [len(text) for text in row["completions"]]
    found = json.loads((context.output / "best_of_n.json").read_text())
    assert [point["n"] for point in found["points"]] == [1, 2, 4, 6]
    for point in found["points"]:
        means = [over_subsets(row, point["n"]) for row in rows]
        assert point["gold"]["value"] == pytest.approx(sum(means) / len(means))
        assert point["gold"]["low"] <= point["gold"]["value"] <= point["gold"]["high"]
        assert point["kl_upper_bound"] == pytest.approx(kl_bound(point["n"]))
        assert outcome.metrics[f"gold/best_of_{point['n']}"] == pytest.approx(sum(means) / len(means))
    rewards = [point["reward"]["value"] for point in found["points"]]
    assert rewards == sorted(rewards)
    assert rewards[-1] == pytest.approx(sum(max(row["rewards"]) for row in rows) / len(rows))
    assert found["points"][0]["gold_gain"]["value"] == 0.0
    assert found["gold_fit"]["points"] == 3
    said = capsys.readouterr().err
    count = len(rows)
    assert f"best-of-n: {count} prompts x 6 completions = {6 * count} completions to sample and score" in said
    assert "KL at most" in said
    assert not (context.output / "best.jsonl").exists()


def test_samples_are_scored_again_by_another_reward(tiny_llama, prompts, code, tmp_path):
    first = by_function(tmp_path, tiny_llama, prompts, code)
    best_of_n.run(first)
    samples = first.output / "samples.jsonl"
    again = context_of(
        tmp_path / "again", {"samples": samples, "function": f"{code}:length"},
        samples=str(samples), function=f"{code}:length",
    )  # fmt: skip
    best_of_n.run(again)
    assert [row["completions"] for row in lines(again)] == [row["completions"] for row in lines(first)]
    assert [row["rewards"] for row in lines(again)] == [row["gold"] for row in lines(first)]
    found = json.loads((again.output / "best_of_n.json").read_text())
    assert "gold" not in found["points"][0]
    assert found["gold_fit"] is None


def test_the_best_of_the_first_completions_are_demonstrations(tiny_llama, prompts, code, tmp_path):
    context = by_function(tmp_path, tiny_llama, prompts, code, write_best=3)
    best_of_n.run(context)
    for row, best in zip(lines(context), lines(context, "best.jsonl"), strict=True):
        first = row["completions"][:3]
        assert best["prompt"] == row["prompt"]
        assert best["completion"] == max(first, key=lambda text: text.count("e"))
        assert best["gold"] == len(best["completion"])


def test_own_prompts_are_all_used_up_to_the_maximum(tiny_llama, prompts, code, tmp_path):
    context = by_function(tmp_path, tiny_llama, prompts, code, prompts=str(prompts), samples_per_prompt=2)
    best_of_n.run(context)
    assert len(lines(context)) == 24
    context = by_function(tmp_path / "few", tiny_llama, prompts, code, max_prompts=3, samples_per_prompt=2)
    best_of_n.run(context)
    assert len(lines(context)) == 3


def test_without_held_out_prompts_it_says_what_to_do(tiny_llama, prompts, code, tmp_path):
    context = by_function(tmp_path, tiny_llama, prompts, code, holdout=0.0)
    with pytest.raises(DataError, match="none of its 24 prompts is held out") as error:
        best_of_n.run(context)
    assert "best_of_n.prompts=PATH" in (error.value.hint or "")


def test_stopped_and_resumed_it_writes_the_same_bytes(tiny_llama, prompts, code, tmp_path):
    straight = by_function(tmp_path / "a", tiny_llama, prompts, code)
    best_of_n.run(straight)
    broken = by_function(tmp_path / "b", tiny_llama, prompts, code, stop=StopAtCheck(12))
    with pytest.raises(Interrupted):
        best_of_n.run(broken)
    assert (broken.work / "samples.jsonl").stat().st_size > 0
    resumed = by_function(tmp_path / "b", tiny_llama, prompts, code)
    best_of_n.run(resumed)
    for name in ("samples.jsonl", "best_of_n.json"):
        assert (resumed.output / name).read_bytes() == (straight.output / name).read_bytes()


@pytest.mark.parametrize(
    ("line", "said"),
    [('{"prompt": "a"}', "other.jsonl:1"), ('{"prompt": "a", "completions": ["x"]}', "two or more"), ("x", "got 'x'")],
)
def test_another_file_is_refused(code, tmp_path, line, said):
    path = tmp_path / "other.jsonl"
    path.write_text(line + "\n")
    context = context_of(
        tmp_path / "stage", {"samples": path, "function": f"{code}:length"},
        samples=str(path), function=f"{code}:length",
    )  # fmt: skip
    with pytest.raises(DataError, match=said):
        best_of_n.run(context)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"function": "a.py:f", "reward_model": "rm"}, "`reward_model` and `function` are mutually exclusive"),
        ({"gold_function": "a.py:f", "gold_model": "rm"}, "`gold_model` and `gold_function` are mutually exclusive"),
        ({"samples": "s.jsonl", "samples_per_prompt": 8}, "`samples_per_prompt` has no effect together with `samples`"),
        ({"samples_per_prompt": 8, "write_best": 9}, "`write_best: 9` exceeds `samples_per_prompt: 8`"),
    ],
)
def test_settings_that_contradict_one_another(settings, said):
    with pytest.raises(ValidationError, match=said):
        Recipe.model_validate({"best_of_n": settings})


@pytest.mark.slow
def test_the_command_with_a_reward_model_and_a_gold_one(rlhf, tiny_llama, tiny_bert, prompts, code, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=1)
    model.classifier.weight.data.normal_(std=5.0)
    model.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "rm")
    command = [
        "best-of-n", "--policy", tiny_llama, "--prompts", prompts, "--reward-model", tmp_path / "rm", "--n", 4,
        "--set", "best_of_n.gold_model=rm", "--set", "best_of_n.sampling.max_new_tokens=6", "--run-dir", "run",
        "--set", "data.prompt_template=null", "--json",
    ]  # fmt: skip
    done = json.loads(rlhf(*command).stdout)
    metrics = done["stages"][0]["metrics"]
    assert metrics["prompts"] == 24
    assert metrics["gold/best_of_4"] == pytest.approx(metrics["reward/best_of_4"])
    assert metrics["reward/best_of_4"] > metrics["reward/best_of_1"]
    assert json.loads(rlhf(*command).stdout)["stages"][0]["status"] == "cached"
    said = rlhf("best-of-n", "--policy", tiny_llama, "--prompts", prompts, "--run-dir", "empty", code=2).stderr
    assert "no reward model in empty: `best-of-n` reads the output of `train-rm`" in said
    assert "best_of_n.function=FILE.py:FUNCTION" in said


def test_references_of_prompts_are_kept_for_the_next_scoring(tmp_path):
    rows = [SampleRow("q", ["a", "b"], reference={"result": 7}), SampleRow("r", ["c", "d"], [1.0, 2.0])]
    (tmp_path / "samples.jsonl").write_text("".join(row.to_line() for row in rows))
    assert read_samples(tmp_path / "samples.jsonl") == rows
