"""Another generator is one argument of `label`, `train-rm`, `ppo` and `evaluate`, and nothing else samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cli.generation.generator import Generator
from rlhf_cli.generation.torch_generator import TorchGenerator
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.evaluate import run as evaluate
from rlhf_cli.stages.label import run as label
from rlhf_cli.stages.ppo import run as ppo
from rlhf_cli.stages.reward_model import run as train_rm
from tests.generation.scripted import LINES, ScriptedGenerator
from tests.stages.context import stage_context

GENERATORS: list[Generator] = [TorchGenerator(), ScriptedGenerator()]


@pytest.fixture
def judge(tmp_path: Path) -> str:
    """Counts letters `e`."""
    (tmp_path / "judge.py").write_text(
        "def score(prompts, completions):\n    return [float(text.count('e')) for text in completions]\n"
    )
    return f"{tmp_path / 'judge.py'}:score"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {number}?"}) + "\n" for number in range(20)))
    return path


def context(name: str, folder: Path, section: dict[str, object], **inputs: object):
    shared = {"model": {"precision": "float32", "device": "cpu"}, "data": {"holdout": 0.3}}
    recipe = Recipe.model_validate(shared | {name.replace("-", "_"): section})
    for part in ("output", "work"):
        (folder / part).mkdir(exist_ok=True)
    return stage_context(name, recipe, output=folder / "output", work=folder / "work", **inputs)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_label(tiny_llama: Path, prompts: Path, judge: str, tmp_path: Path):
    section = {"by": "function", "function": judge, "completions_per_prompt": 3}
    given = context("label", tmp_path, section, policy=tiny_llama, prompts=prompts, function=judge)
    outcome = label.run(given, ScriptedGenerator())
    assert {text for row in rows(tmp_path / "output" / "rankings.jsonl") for text in row["completions"]} == set(LINES)
    assert outcome.metrics["finished_share"] == 1.0


def test_evaluate(tiny_llama: Path, prompts: Path, judge: str, tmp_path: Path):
    section = {"judge_function": judge}
    given = context(
        "evaluate", tmp_path, section, baseline=tiny_llama, policy=tiny_llama, prompts=prompts, judge_function=judge
    )
    metrics = evaluate.run(given, ScriptedGenerator()).metrics
    written = rows(tmp_path / "output" / "samples.jsonl")
    assert {row["policy"] for row in written} <= set(LINES)
    assert all(row["policy"] == row["baseline"] for row in written), "the same seeds for both"
    assert metrics["kl_nats"] == pytest.approx(0.0, abs=1e-6)


def test_ppo(tiny_llama: Path, prompts: Path, judge: str, tmp_path: Path):
    seen = tmp_path / "seen.txt"
    (tmp_path / "judge.py").write_text(
        "def score(prompts, completions):\n"
        f"    open({str(seen)!r}, 'a').writelines(text + '\\n' for text in completions)\n"
        "    return [float(text.count('e')) for text in completions]\n"
    )
    section = {"steps": 1, "prompts_per_step": 8, "max_new_tokens": 40, "rewards": [{"function": judge}]}
    given = context("ppo", tmp_path, section, policy=tiny_llama, prompts=prompts)
    outcome = ppo.run(given, ScriptedGenerator())
    assert {*seen.read_text().splitlines()} <= set(LINES)
    assert outcome.metrics["episode"] == 8.0


def test_normalization_of_a_reward_model(tiny_llama: Path, tmp_path: Path):
    data = tmp_path / "rankings.jsonl"
    lines = [{"prompt": f"Question {n}?", "chosen": "water bread", "rejected": "bread"} for n in range(20)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcomes = []
    for number, generator in enumerate(GENERATORS):
        (tmp_path / str(number)).mkdir()
        section = {"epochs": 1.0, "batch_size": 8, "data": str(data)}
        given = context("train-rm", tmp_path / str(number), section, policy=tiny_llama, rankings=data)
        outcomes.append(train_rm.run(given, generator).metrics)
    drawn, scripted = outcomes
    assert drawn["rm/accuracy"] == scripted["rm/accuracy"]
    assert drawn["rm/mean"] != scripted["rm/mean"]


def test_no_stage_samples_or_formats_prompts_of_a_language_model_on_its_own():
    """One home each: templates, formats, stop tokens and prompt limits are `generation`'s."""
    package = Path(label.__file__).parents[1]
    texts = {path: path.read_text() for path in package.rglob("*.py")}
    for word in ("generation_config", "eos_token_id", ".generate(policy", "apply_chat_template"):
        found = {path.relative_to(package).as_posix() for path, text in texts.items() if word in text}
        drawing = {"evaluate/sampling.py", "completions.py", "reward_model/normalization.py", "trial.py"}
        drawing.add("evaluate/base_model.py")
        drawing.add("ppo/model_saving.py")  # the completions on which the written policy is compared
        allowed = {".generate(policy": drawing}
        assert found <= allowed.get(word, set()), word
