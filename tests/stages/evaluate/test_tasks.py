"""Tasks of lm-eval, with a module in its place that has its interface."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

STAND_IN = """
import pathlib

calls = pathlib.Path(__file__).parent.parent / "calls"


def simple_evaluate(model, tasks, **seeds):
    assert set(seeds) == {"random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"}
    (task,) = tasks
    if task == "unknown":
        raise KeyError("unknown")
    with calls.open("a") as file:
        file.write(task + "\\n")
    size = float(sum(p.numel() for p in model.pretrained.parameters()))
    metrics = {"alias": task, "acc,none": 0.25, "acc_stderr,none": 0.1}
    metrics |= {"size,strict": size, "size_stderr,strict": "N/A"}
    return {"results": {task: metrics}, "n-samples": {task: {"original": 20, "effective": 12}}}
"""
HUGGING_FACE = """
class HFLM:
    def __init__(self, pretrained, tokenizer, batch_size):
        assert tokenizer.eos_token_id is not None
        self.pretrained = pretrained
"""


@pytest.fixture
def evaluate(rlhf_here, tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(4)))
    (tmp_path / "rate.py").write_text("def score(p, c):\n    return [float(len(text)) for text in c]\n")

    def run(tasks: str, *more: object) -> tuple[int, str]:
        return rlhf_here(
            "evaluate", "--baseline", tiny_llama, "--policy", tiny_gpt2, "--prompts", "p.jsonl", "--function",
            "rate.py:score", "--set", "evaluate.sampling.max_new_tokens=4", "--set", "data.prompt_template=null",
            "--set", f"evaluate.tasks={tasks}", *more,
        )  # fmt: skip

    return run


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "harness/lm_eval"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    (package / "models/__init__.py").write_text("")
    (package / "models/huggingface.py").write_text(HUGGING_FACE)
    monkeypatch.syspath_prepend(tmp_path / "harness")
    yield
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        del sys.modules[name]


def test_every_model_runs_every_task_and_the_figures_have_intervals(evaluate, stand_in, tiny_llama, tmp_path):
    code, said = evaluate("[first, second]")
    assert code == 0, said
    assert (tmp_path / "harness/calls").read_text().split() == ["first", "second"] * 2
    folder = tmp_path / "runs/default/evaluate"
    figures = json.loads((folder / "evaluation.json").read_text())["models"][tiny_llama.name]
    accuracy = figures["task/first/acc"]
    assert (accuracy["value"], accuracy["n"]) == (0.25, 12)
    assert accuracy["low"] == pytest.approx(0.25 - 0.196, abs=1e-3)
    assert accuracy["high"] == pytest.approx(0.25 + 0.196, abs=1e-3)
    size = figures["task/second/size (strict)"]
    assert size["low"] is None
    assert "no standard error" in size["missing"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["task/first/acc/policy"] == metrics["task/first/acc/baseline"] == 0.25
    assert metrics["task/first/size (strict)/policy"] != metrics["task/first/size (strict)/baseline"], "each its model"
    assert "0.054 to 0.446" in said


def test_a_task_that_does_not_exist_is_an_error_and_earlier_ones_are_kept(evaluate, stand_in, tmp_path):
    code, said = evaluate("[first, unknown]")
    assert code == 2, said
    assert "lm-eval cannot run the task `unknown` of `evaluate.tasks`" in said
    assert "lm-eval ls tasks" in said
    evaluate("[first, unknown]")
    assert (tmp_path / "harness/calls").read_text().split() == ["first"], "kept for the next attempt"


def test_without_the_package_nothing_starts(evaluate, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else find(name, *more)
    )
    code, said = evaluate("[first]")
    assert code == 2
    assert "`evaluate.tasks: ['first']` needs lm-eval, which is not installed" in said
    assert "pip install 'rlhf-cli[tasks]'" in said
    assert "completions" not in said
