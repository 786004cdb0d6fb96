"""The `label` stage: sampled answers ranked by a function or a reward model, or rankings brought in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cli.data.sources import read_records
from rlhf_cli.errors import DataError, Interrupted, UsageError
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.base import StageOutcome
from rlhf_cli.stages.label import run as label
from tests.stages.context import stage_context
from tests.stops import NeverStop, StopAtCheck

GOLD = """
def score(prompts, completions):
    return [float(completion.count("e")) for completion in completions]
"""


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def gold(tmp_path: Path) -> str:
    (tmp_path / "gold.py").write_text(GOLD)
    return f"{tmp_path / 'gold.py'}:score"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "prompts.jsonl", [{"prompt": "x" * (n % 5 + 1) + f" {n}?"} for n in range(12)])


def run(folder: Path, inputs: dict[str, str], stop: StopAtCheck | None = None, **settings: object) -> StageOutcome:
    data = settings.pop("shared", {})
    sampling = {"max_new_tokens": 12, "batch_size": 8} | settings.pop("sampling", {})  # type: ignore[operator]
    section = {"completions_per_prompt": 4, "sampling": sampling} | settings
    recipe = Recipe.model_validate({"model": {"precision": "float32"}, "data": data, "label": section})
    output, work = folder / "out", folder / "work"
    output.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    return label.run(stage_context("label", recipe, output=output, work=work, stop=stop or NeverStop(), **inputs))


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "rankings.jsonl").read_text().splitlines()]


def by_function(gold: str, prompts: Path, model: Path) -> dict[str, str]:
    return {"policy": str(model), "prompts": str(prompts), "function": gold}


def test_every_prompt_gets_k_ranked_answers(gold: str, prompts: Path, tiny_llama: Path, tmp_path: Path):
    outcome = run(tmp_path, by_function(gold, prompts, tiny_llama), by="function", function=gold)
    written = rows(tmp_path)
    assert [row["prompt"] for row in written] == [json.loads(line)["prompt"] for line in prompts.open()]
    for row in written:
        assert len(row["completions"]) == len(row["scores"]) == 4
        assert row["scores"] == [text.count("e") for text in row["completions"]]
        levels = {index: tier for tier, members in enumerate(row["ranking"]) for index in members}
        for a in range(4):
            for b in range(4):
                assert (row["scores"][a] > row["scores"][b]) == (levels[a] < levels[b])
    assert len({text for row in written for text in row["completions"]}) > 24  # drawn, not repeated
    assert (outcome.metrics["prompts"], outcome.metrics["completions"]) == (12, 48)
    assert outcome.metrics["mean_score"] == pytest.approx(sum(sum(row["scores"]) for row in written) / 48)
    assert 1 <= outcome.metrics["mean_tokens"] <= 12
    assert 0 <= outcome.metrics["finished_share"] <= 1
    assert not outcome.skipped
    read = read_records(str(tmp_path / "out" / "rankings.jsonl"), "ranking", max_skip=1.0)
    assert len(read.records) + read.skips.total == 12


def test_stopped_and_resumed_sampling_writes_the_same_bytes(gold: str, prompts: Path, tiny_llama: Path, tmp_path: Path):
    inputs = by_function(gold, prompts, tiny_llama)
    settings = {"by": "function", "function": gold}
    run(tmp_path / "straight", inputs, **settings)
    with pytest.raises(Interrupted):
        run(tmp_path / "broken", inputs, StopAtCheck(3 * 12 + 5), **settings)  # at the fifth token of the fourth batch
    samples = tmp_path / "broken" / "work" / "samples.jsonl"
    assert len(samples.read_text().splitlines()) == 3 * 8
    with samples.open("ab") as file:
        file.write(b'{"prompt": 3, "te')  # a kill in the middle of a line
    run(tmp_path / "broken", inputs, **settings)
    for name in ("out/rankings.jsonl", "work/samples.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_answers_belong_to_prompt_and_seed(gold: str, prompts: Path, tiny_llama: Path, tmp_path: Path):
    settings = {"by": "function", "function": gold}
    run(tmp_path / "a", by_function(gold, prompts, tiny_llama), **settings)
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("".join(reversed(prompts.read_text().splitlines(keepends=True))))
    run(tmp_path / "b", by_function(gold, backwards, tiny_llama), sampling={"batch_size": 3}, **settings)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")[::-1]
    run(tmp_path / "c", by_function(gold, prompts, tiny_llama), sampling={"temperature": 0.2}, **settings)
    assert rows(tmp_path / "c") != rows(tmp_path / "a")


def test_a_prompt_that_comes_twice_is_labeled_once(gold: str, tiny_llama: Path, tmp_path: Path):
    data = jsonl(tmp_path / "p.jsonl", [{"prompt": "a?"}, {"prompt": "b?"}, {"prompt": "a?"}])
    run(tmp_path, by_function(gold, data, tiny_llama), by="function", function=gold)
    assert [row["prompt"] for row in rows(tmp_path)] == ["a?", "b?"]


def test_prompts_without_room_are_skipped(gold: str, tiny_llama: Path, tmp_path: Path):
    data = jsonl(tmp_path / "p.jsonl", [{"prompt": "a?"}, {"prompt": "long? " * 50}, {"prompt": "b?"}])
    inputs, settings = by_function(gold, data, tiny_llama), {"by": "function", "function": gold}
    outcome = run(tmp_path / "a", inputs, shared={"max_skip": 0.5, "max_prompt_tokens": 40}, **settings)
    assert outcome.skipped == {"prompt longer than 40 tokens": 1}
    assert f"{data}:2" in (tmp_path / "a" / "out" / "skips.jsonl").read_text()
    with pytest.raises(DataError, match="none of its 3 records"):
        run(tmp_path / "b", inputs, shared={"max_skip": 1.0, "max_prompt_tokens": 1}, **settings)
    with pytest.raises(UsageError, match=r"completions of 256 tokens leave no room .* reads 256 tokens in all"):
        run(tmp_path / "c", inputs, sampling={"max_new_tokens": 256}, **settings)


def test_an_encoder_decoder_answers_too(gold: str, prompts: Path, tiny_t5: Path, tmp_path: Path):
    run(tmp_path, by_function(gold, prompts, tiny_t5), by="function", function=gold)
    assert len(rows(tmp_path)) == 12


def test_a_reward_model_ranks(prompts: Path, tiny_llama: Path, tiny_bert: Path, tmp_path: Path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=1)
    model.classifier.weight.data.normal_(std=5.0)
    model.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "rm")
    inputs = {"policy": str(tiny_llama), "prompts": str(prompts), "reward_model": str(tmp_path / "rm")}
    run(tmp_path, inputs, by="reward-model", reward_model=str(tmp_path / "rm"))
    written = rows(tmp_path)
    assert len({score for row in written for score in row["scores"]}) > 24
    for row in written:
        best = max(range(4), key=lambda index: row["scores"][index])
        assert best in row["ranking"][0]


def test_rankings_and_preferences_are_brought_in_as_they_are(tmp_path: Path):
    data = jsonl(
        tmp_path / "ranked.jsonl",
        [
            {"prompt": "p", "completions": ["a", "bb", "c"], "ranking": [[1], [0, 2]]},
            {"prompt": [{"role": "user", "content": "hi"}], "chosen": "x", "rejected": "yy", "margin": 2.0},
        ],
    )
    with pytest.raises(DataError, match="mixed"):
        run(tmp_path / "mixed", {"rankings": str(data)}, by="import", data=str(data))
    lines = data.read_text().splitlines()
    for name, line in zip("ab", lines, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(line + "\n")
        run(tmp_path / name, {"rankings": str(tmp_path / f"{name}.jsonl")}, by="import", data=f"{name}.jsonl")
    assert rows(tmp_path / "a") == [json.loads(lines[0])]
    assert rows(tmp_path / "b") == [
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "completions": ["x", "yy"],
            "ranking": [[0], [1]],
            "margin": 2.0,
        }
    ]


def test_bringing_rankings_in_loads_no_model_library(tmp_path: Path, rlhf):
    data = jsonl(tmp_path / "d.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')\n")
    done = rlhf("label", "--data", data, "--run-dir", "run", "--json", env={"PYTHONPATH": str(tmp_path)})
    assert json.loads(done.stdout)["stages"][0]["metrics"]["prompts"] == 1
    assert (tmp_path / "run" / "label" / "rankings.jsonl").is_file()


def test_the_command_tells_what_came_out_and_nothing_else(
    gold: str, prompts: Path, tiny_llama: Path, tmp_path: Path, rlhf
):
    arguments = ["label", "--model", tiny_llama, "--prompts", prompts, "--function", gold, "--run-dir", "run"]
    done = rlhf(*arguments, "--set", "label.sampling.max_new_tokens=5")
    assert len((tmp_path / "run" / "label" / "rankings.jsonl").read_text().splitlines()) == 12
    beginnings = (
        "label",
        "sampling",
        "scoring",
        "other ",
        "whole stage ",
        "warning: ",
        "attention: ",
        "the model is prompted",
    )
    said, table = done.stderr.split("\nstage  ")
    assert [line for line in said.splitlines() if line and not line.startswith(beginnings)] == []
    assert "results are in run/, one folder per stage" in table
    assert "with your permissions" in done.stderr


def test_real_rankings_are_brought_in(shared_data: Path, tmp_path: Path):
    source = str(shared_data / "qa_rankings.jsonl")
    outcome = run(tmp_path, {"rankings": source}, by="import", data=source, shared={"max_skip": 0.05})
    assert outcome.metrics["prompts"] + sum(outcome.skipped.values()) == 370
    assert 0.4 < outcome.metrics["longer_wins_share"] < 0.7
