"""Two evaluations in one run directory: the earlier results stay, and what happens to them is said."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def evaluate(rlhf_here, tiny_llama, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(3)))
    (tmp_path / "rate.py").write_text("def score(p, c):\n    return [float(len(text)) for text in c]\n")

    def run(*arguments, policy=tiny_llama):
        code, said = rlhf_here(
            "evaluate", "--baseline", tiny_llama, "--policy", policy, "--prompts", "prompts.jsonl",
            "--function", "rate.py:score", "--set", "evaluate.sampling.max_new_tokens=4",
            "--set", "data.prompt_template=null", *arguments,
        )  # fmt: skip
        assert code == 0, said
        return said

    return run


def test_an_evaluation_of_something_else_keeps_the_earlier_one(evaluate, tiny_gpt2, tmp_path):
    folder = tmp_path / "runs/default"
    kept = folder / "kept/evaluate"
    evaluate()
    first = (folder / "evaluate/metrics.json").read_bytes()
    assert not kept.exists()
    said = evaluate(policy=tiny_gpt2)
    (place,) = kept.iterdir()
    assert f"the earlier results will move to {place.relative_to(tmp_path)}; another --run-dir keeps both" in said
    assert (place / "metrics.json").read_bytes() == first
    second = (folder / "evaluate/metrics.json").read_bytes()
    assert second != first

    assert "the earlier results" not in evaluate(policy=tiny_gpt2), "unchanged"
    assert "the earlier results" not in evaluate("--force", policy=tiny_gpt2), "the same evaluation"
    evaluate()
    assert (folder / "evaluate/metrics.json").read_bytes() == first
    assert {(one / "metrics.json").read_bytes() for one in kept.iterdir()} == {first, second}
    evaluate(policy=tiny_gpt2)
    assert len(list(kept.iterdir())) == 2, "each evaluation is kept once"
