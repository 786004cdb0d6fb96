"""People as judges: they rank what an evaluation wrote, and the same evaluation counts their labels."""

from __future__ import annotations

import json

import pytest

from rlhf_cli.data.records import Ranking, prompt_key
from rlhf_cli.errors import RecipeError
from rlhf_cli.recipe.loader import load_recipe
from rlhf_cli.stages.evaluate.people import ITEMS, PeopleLabels
from tests.stages.evaluate.test_policies import SETTINGS, arguments, files, others, results

__all__ = ["files", "others"]


def labels(*orders: tuple[tuple[int, ...], ...]) -> PeopleLabels:
    texts = ("zero", "one", "two")
    key = prompt_key("q")
    return PeopleLabels("people.jsonl", {key: [Ranking("q", texts, order) for order in orders]})


@pytest.mark.parametrize(
    ("orders", "policy", "baseline", "expected"),
    [
        ((((0,), (1,), (2,)),), "zero", "one", "policy"),
        ((((0,), (1,), (2,)),), "two", "one", "baseline"),
        ((((0, 1), (2,)),), "zero", "one", "tie"),
        ((((0,), (1, 2)), ((1,), (0, 2)), ((0,), (2,), (1,))), "zero", "one", "policy"),
        ((((0,), (1,), (2,)), ((1,), (0,), (2,))), "zero", "one", "tie"),
        # Each annotator has one vote: how far apart they put two completions does not count.
        ((((0,), (2,), (1,)), ((1,), (0,), (2,)), ((1,), (0,), (2,))), "zero", "one", "baseline"),
        ((((0,), (1,), (2,)),), "same", "same", "tie"),
        ((((0,), (1,), (2,)),), "zero", "unknown", None),
    ],
)
def test_the_majority_of_annotators_decides(orders, policy, baseline, expected):
    assert labels(*orders).verdict(prompt_key("q"), policy, baseline) == expected
    assert labels(*orders).verdict(prompt_key("other"), "zero", "unknown") is None


def ranked_by_length(line: str) -> str:
    item = json.loads(line)
    texts = item["completions"]
    order = sorted(range(len(texts)), key=lambda index: (len(texts[index]), texts[index]))
    return json.dumps(item | {"ranking": [[index] for index in order], "annotator": "ada"}) + "\n"


def test_labels_of_the_items_decide_the_same_evaluation(rlhf_here, tiny_llama, others, files, tmp_path):
    code, said = rlhf_here(*arguments(tiny_llama, others[0], "--also", f"second={others[1]}"))
    assert code == 0, said
    lines = (tmp_path / "runs/default/evaluate" / ITEMS).read_text().splitlines()
    assert all(set(json.loads(line)) == {"prompt", "completions"} for line in lines), "no names: annotators are blind"
    (tmp_path / "people.jsonl").write_text("".join(map(ranked_by_length, lines[:8])))
    own = ("evaluate", "--baseline", tiny_llama, "--policy", others[0], "--prompts", "p.jsonl", *SETTINGS)
    own = (*own, "--also", f"second={others[1]}", "--set", "evaluate.labels=people.jsonl", "--run-dir", "runs/people")
    code, said = rlhf_here(*own)
    assert code == 0, said
    assert "8 of 12 prompts are labeled and used" in said
    evaluation, _, rows = results(tmp_path / "runs/people/evaluate")
    assert (evaluation["judge"], evaluation["prompts"]) == ("people", 8)
    for row in rows:
        key = {side: (len(row[side]), row[side]) for side in ("policy", "baseline")}
        expected = "tie" if row["policy"] == row["baseline"] else min(key, key=key.__getitem__)
        assert row["winner"] == expected
    code, said = rlhf_here(*own, "--seed", "7", "--force")
    assert code == 65
    assert "no label ranks the completions of" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("labels: p.jsonl, judge_function: f.py:f", "`judge_function` and `labels` are mutually exclusive"),
        ("labels: p.jsonl, tie_margin: 0.1", "`tie_margin` has no effect with `labels`"),
    ],
)
def test_one_judge_decides(tmp_path, settings, said):
    (tmp_path / "r.yaml").write_text(f"model: {{path: m}}\nevaluate: {{{settings}}}\n")
    with pytest.raises(RecipeError, match=said):
        load_recipe(tmp_path / "r.yaml")
