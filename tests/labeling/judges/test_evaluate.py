"""A panel of judges decides which model wins an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cli.errors import RecipeError
from rlhf_cli.recipe.loader import load_recipe


@pytest.fixture
def evaluate(rlhf_here, endpoint, tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(6)))
    panel = f"evaluate.judge.panel=[{{url: {endpoint.url}, name: m}}]"

    def run(*more: object, code: int | None = 0) -> str:
        ended, said = rlhf_here(
            "evaluate", "--baseline", tiny_llama, "--policy", tiny_gpt2, "--prompts", "p.jsonl", "--set", panel,
            "--set", "evaluate.sampling.max_new_tokens=6", "--set", "data.prompt_template=null",
            "--set", "model.precision=float32", *more,
        )  # fmt: skip
        assert code is None or ended == code, said
        return said

    return run


def test_the_verdicts_decide_and_are_asked_once(evaluate, endpoint, tiny_llama, tmp_path):
    said = evaluate("--also", f"same={tiny_llama}")
    folder = tmp_path / "runs/default/evaluate"
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    lengths = [(len(row["policy"].strip()), len(row["baseline"].strip())) for row in rows]
    winners = ["policy" if own > other else "baseline" if own < other else "tie" for own, other in lengths]
    assert [row["winner"] for row in rows] == winners
    assert len(set(winners)) > 1 or winners[0] != "tie"
    assert all(row["policies"]["same"]["winner"] == "tie" for row in rows), "the same model with the same seeds"
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["judge"] == "judges"
    points = [{"policy": 1.0, "tie": 0.5, "baseline": 0.0}[winner] for winner in winners]
    assert evaluation["pairs"][0]["win_rate"]["value"] == pytest.approx(sum(points) / len(points))
    other = next(
        pair for pair in evaluation["pairs"] if pair["policy"] == "same" and pair["baseline"] != tiny_llama.name
    )
    assert other["win_rate"]["value"] == pytest.approx(1 - sum(points) / len(points)), "policies against one another"
    assert (folder / "votes.jsonl").is_file()
    assert json.loads((folder / "judge.json").read_text())["rows_without_verdict"] == 0
    assert "by the judges" in said

    asked = len(endpoint.requests)
    evaluate("--also", f"same={tiny_llama}", "--force")
    assert len(endpoint.requests) == asked, "replies are kept"


def test_judges_that_say_nothing_are_an_error(evaluate, endpoint):
    endpoint.judge = lambda model, answers: "I cannot decide."
    said = evaluate(code=None)
    assert "evaluate.judge" in said or "no usable" in said
    assert "error:" in said


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ("judge_function: f.py:score, judge: {panel: [{model: j}]}", "mutually exclusive"),
        ("tie_margin: 0.5, judge: {panel: [{model: j}]}", "`tie_margin` has no effect"),
    ],
)
def test_settings_that_contradict_each_other(section, why, tmp_path):
    (tmp_path / "r.yaml").write_text(f"name: r\nmodel: {{path: some/model}}\nevaluate: {{{section}}}\n")
    with pytest.raises(RecipeError, match=why):
        load_recipe(tmp_path / "r.yaml", [])
