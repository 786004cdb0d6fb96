"""Several policies in one evaluation, every figure with its interval, and what survives a kill."""

from __future__ import annotations

import io
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_cli.errors import Interrupted, RecipeError
from rlhf_cli.generation.generator import Completion
from rlhf_cli.generation.policy import TokenScores
from rlhf_cli.intervals import Measure
from rlhf_cli.recipe.loader import load_recipe
from rlhf_cli.recipe.show import derived_sizes
from rlhf_cli.stages.evaluate.results import evaluation_of
from rlhf_cli.stages.evaluate.sampling import Sampler
from rlhf_cli.stages.evaluate.sides import Side
from rlhf_cli.stages.evaluate.tables import models_table, pairs_table, tasks_table

SETTINGS = (
    "--set", "evaluate.sampling.max_new_tokens=6", "--set", "evaluate.sampling.batch_size=4",
    "--set", "evaluate.samples_per_prompt=2", "--set", "data.prompt_template=null", "--set", "model.precision=float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def others(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The model with noise on its output layer, twice."""
    folders = []
    for number in (1, 2):
        torch.manual_seed(number)
        folder = tmp_path_factory.mktemp("models") / f"other-{number}"
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        with torch.no_grad():
            weight: Any = model.lm_head.weight
            weight += 0.05 * torch.randn_like(weight)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
        folders.append(folder)
    return folders


@pytest.fixture
def files(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(12)))
    rows = [{"prompt": f"Ask {n}", "completion": f"Answer {n} " * 3} for n in range(5)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rate.py").write_text(
        "def score(p, c):\n    return [float(len(text) + text.count('e')) for text in c]\n"
    )


def arguments(baseline: Path, policy: Path, *more: object) -> tuple[object, ...]:
    given = ("--baseline", baseline, "--policy", policy, "--prompts", "p.jsonl", "--function", "rate.py:score")
    return ("evaluate", *given, *SETTINGS, *more)


def results(folder: Path) -> tuple[dict, dict, list[dict]]:
    lines = (folder / "samples.jsonl").read_text().splitlines()
    evaluation, metrics = (json.loads((folder / name).read_text()) for name in ("evaluation.json", "metrics.json"))
    return evaluation, metrics, [json.loads(line) for line in lines]


def test_every_policy_against_the_baseline_and_the_others(rlhf_here, tiny_llama, others, files, tmp_path):
    code, said = rlhf_here(
        *arguments(tiny_llama, others[0], "--also", f"second={others[1]}", "--demonstrations", "d.jsonl")
    )
    assert code == 0, said
    evaluation, metrics, rows = results(tmp_path / "runs/default/evaluate")
    base, first = tiny_llama.name, others[0].name
    assert list(evaluation["models"]) == [base, first, "second"]
    pairs = [(pair["policy"], pair["baseline"]) for pair in evaluation["pairs"]]
    assert pairs == [(first, base), ("second", base), ("second", first)]
    assert evaluation["prompts"] == 12
    assert evaluation["samples_per_prompt"] == 2

    by_hand = {}
    for row in rows:
        scores = {base: row["gold_baseline"], first: row["gold_policy"], "second": row["policies"]["second"]["gold"]}
        for policy, other in pairs:
            mark = 0.5 * (1 + (scores[policy] > scores[other]) - (scores[policy] < scores[other]))
            by_hand.setdefault((policy, other), []).append(mark)
    for pair in evaluation["pairs"]:
        own = by_hand[pair["policy"], pair["baseline"]]
        rate = pair["win_rate"]
        assert rate["value"] == pytest.approx(sum(own) / len(own))
        assert rate["low"] < rate["value"] < rate["high"]
        assert rate["n"] == 12
        assert ("kl_nats" in pair) is (pair["baseline"] == base), "log-ratios are to the baseline"
        assert 0.0 <= pair["sign_test"]["p_value"] <= 1.0
        assert set(pair["differences"]) == {"gold", "characters"}
        assert pair["conclusion"]
    assert metrics["win_rate"] == pytest.approx(evaluation["pairs"][0]["win_rate"]["value"])
    assert metrics["second/win_rate"] == pytest.approx(evaluation["pairs"][1]["win_rate"]["value"])
    assert metrics["kl_nats"] == pytest.approx(evaluation["pairs"][0]["kl_nats"]["k1"]["value"])
    assert metrics["second/kl_nats"] == pytest.approx(
        sum(row["policies"]["second"]["kl_nats"] for row in rows) / len(rows)
    )
    assert all(isinstance(value, float) for value in metrics.values()), "manifest metrics are flat"
    for figures in evaluation["models"].values():
        for name, figure in figures.items():
            assert {"value", "low", "high", "n"} <= set(figure), name
            assert "missing" in figure or figure["low"] <= figure["value"] <= figure["high"], name
    assert "equal lengths" in said
    assert "perplexity" in said


def side(name: str, number: int) -> Side:
    texts = [f"{'word ' * (number + row % 3)}end" for row in range(24)]
    completions = [Completion([5] * len(text), text, finished=row % 2 == 0) for row, text in enumerate(texts)]
    scores = [TokenScores([-1.0] * len(text), 1.5 * len(text)) for text in texts]
    gold = [float((7 * row + number) % 5) for row in range(24)]
    task = {"a_long_name_of_a_task/acc_norm (strict-match)": Measure(0.5, 0.4, 0.6, 20)}
    policy: Any = None
    return Side(name, policy, completions, scores, log_ratios=[[0.1, -0.2]] * 24, gold=gold, reward=gold, tasks=task)


def test_the_tables_fit_80_columns():
    names = ("runs/a/sft", "a rather long name of a policy, number one", "acme/a-very-long-name-of-a-model-1.7B", "b")
    sides = [side(name, number) for number, name in enumerate(names)]
    prompts = [f"p{row // 2}" for row in range(24)]
    evaluation = evaluation_of(prompts, sides[0], sides[1:], decided_by="function", tie_margin=0.0)
    assert len(evaluation.pairs) == 6
    for pair in evaluation.pairs:
        assert pair.joint.high - pair.joint.low > pair.win_rate.high - pair.win_rate.low, "of six pairs"
        assert pair.to_json()["win_rate_joint"]["pairs"] == 6
        assert pair.conclusion.endswith("all 6 pairs together")
    metrics = evaluation.flat_metrics()
    assert metrics["win_rate_joint_low"] == evaluation.pairs[0].joint.low
    screen = io.StringIO()
    for table in (models_table(evaluation), pairs_table(evaluation), tasks_table(evaluation)):
        Console(width=80, file=screen).print(table)
    shown = screen.getvalue()
    assert all(len(line) <= 80 for line in shown.splitlines()), shown
    for part in ("12 prompts", "gold", "entropy", "equal", "95% interval", "sign p", "a_long_name", "0.400 to 0.600"):
        assert part in shown
    assert "…" not in shown, "folded, not cut"


def test_entropy_and_perplexity_by_hand(rlhf_here, tiny_llama, others, files, tmp_path):
    code, said = rlhf_here(
        *arguments(tiny_llama, others[0], "--demonstrations", "d.jsonl", "--set", "evaluate.sampling.temperature=0.7")
    )
    assert code == 0, said
    evaluation, metrics, _ = results(tmp_path / "runs/default/evaluate")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    nats, tokens = {}, 0
    for role, folder in (("baseline", tiny_llama), ("policy", others[0])):
        model = AutoModelForCausalLM.from_pretrained(folder)
        nats[role], tokens = 0.0, 0
        for line in (tmp_path / "d.jsonl").read_text().splitlines():
            record = json.loads(line)
            prompt = tokenizer(record["prompt"]).input_ids
            completion = tokenizer(record["completion"], add_special_tokens=False).input_ids
            completion.append(tokenizer.eos_token_id)
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            nats[role] -= logits.log_softmax(-1)[range(len(completion)), completion].sum().item()
            tokens += len(completion)
        assert metrics[f"perplexity/{role}"] == pytest.approx(math.exp(nats[role] / tokens), rel=1e-4), "temperature 1"
    tax = evaluation["pairs"][0]["alignment_tax_nats_per_token"]
    assert tax["value"] == pytest.approx((nats["policy"] - nats["baseline"]) / tokens, abs=1e-4)
    assert tax["n"] == 5
    # The model is almost uniform over its vocabulary, whose logarithm bounds the entropy.
    bound = math.log(len(tokenizer))
    assert 0.8 * bound < metrics["entropy/policy"] <= bound
    assert evaluation["models"][tiny_llama.name]["entropy"]["n"] == 12


def test_demonstrations_that_were_trained_on_are_left_out(rlhf_here, tiny_llama, others, files, tmp_path):
    trained = tmp_path / "trained"
    code, said = rlhf_here(
        "sft", "--model", tiny_llama, "--data", "d.jsonl", "--set", "sft.epochs=1", "--run-dir", trained,
        "--set", "data.holdout=0.4", "--set", "data.prompt_template=null",
    )  # fmt: skip
    assert code == 0, said
    code, said = rlhf_here(*arguments(tiny_llama, trained / "sft", "--demonstrations", "d.jsonl"))
    assert code == 0, said
    count = results(tmp_path / "runs/default/evaluate")[0]["models"][tiny_llama.name]["perplexity"]["n"]
    assert 0 < count < 5
    assert f"{5 - count} of 5 demonstrations were trained on and are skipped" in said


KILLS = """
import os, pathlib, signal
folder = pathlib.Path(__file__).parent
def score(prompts, completions):
    calls = folder / "calls"
    number = calls.stat().st_size if calls.exists() else 0
    with calls.open("a") as file:
        file.write("x")
    if number == 1 and (folder / "armed").exists():
        (folder / "armed").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(text)) for text in completions]
"""


@pytest.mark.slow
def test_a_killed_evaluation_resumes_with_what_it_had(rlhf, tiny_llama, others, files, tmp_path):
    (tmp_path / "rate.py").write_text(KILLS)
    given = arguments(tiny_llama, others[0], "--demonstrations", "d.jsonl")
    rlhf(*given, "--run-dir", "whole")
    assert (tmp_path / "calls").read_text() == "xx"
    (tmp_path / "calls").unlink()
    (tmp_path / "armed").touch()
    rlhf(*given, "--run-dir", "cut", code=-signal.SIGKILL)
    said = " ".join(rlhf(*given, "--run-dir", "cut").stderr.split())
    assert "evaluate: resuming" in said
    assert said.count("completions were sampled before") == 2
    assert (tmp_path / "calls").read_text() == "xxx", "the baseline's scores were on disk"
    for name in ("evaluation.json", "metrics.json", "samples.jsonl"):
        assert (tmp_path / "cut/evaluate" / name).read_bytes() == (tmp_path / "whole/evaluate" / name).read_bytes()


def test_models_of_one_name_are_refused(rlhf_here, tiny_llama, others, files):
    code, said = rlhf_here(*arguments(tiny_llama, others[0], "--also", others[0]))
    assert code != 0
    assert f"two models of the evaluation are called `{others[0].name}`" in said
    assert "--also NAME=MODEL" in said


def test_without_a_policy_the_first_of_the_others_is_evaluated(rlhf_here, tiny_llama, others, files, tmp_path):
    code, said = rlhf_here(
        "evaluate", "--baseline", tiny_llama, "--also", f"mine={others[0]}", "--prompts", "p.jsonl",
        "--function", "rate.py:score", *SETTINGS,
    )  # fmt: skip
    assert code == 0, said
    assert list(results(tmp_path / "runs/default/evaluate")[0]["models"]) == [tiny_llama.name, "mine"]


def recipe_of(tmp_path: Path, text: str):
    (tmp_path / "r.yaml").write_text(f"name: r\nmodel: {{path: some/model}}\n{text}")
    return load_recipe(tmp_path / "r.yaml", [])


def test_names_come_with_an_equals_sign_or_as_settings(tmp_path):
    recipe = recipe_of(
        tmp_path,
        "evaluate: {policies: [{model: a=runs/a/ppo}, {model: ./a=b/ppo}, {model: x=y, name: n}]}\n",
    ).recipe
    assert [(one.name, one.model) for one in recipe.evaluate.policies] == [
        ("a", "runs/a/ppo"), (None, "./a=b/ppo"), ("n", "x=y"),
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="two `policies` are named `a`"):
        recipe_of(tmp_path, "evaluate: {policies: [{model: x, name: a}, {model: y, name: a}]}\n")
    with pytest.raises(RecipeError, match="expected up to 40 letters"):
        recipe_of(tmp_path, 'evaluate: {policies: [{model: x, name: "a\\nb"}]}\n')


def test_the_precision_is_known_before_the_run(tmp_path, rlhf_here):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(300)))

    def sizes(text: str) -> dict:
        return derived_sizes(recipe_of(tmp_path, text).recipe)["evaluate"]

    named = sizes(f"evaluate: {{prompts: {tmp_path}/p.jsonl, policies: [{{model: x}}], samples_per_prompt: 4}}\n")
    assert named["completions per prompt, all models together"] == 12
    assert named["prompts to evaluate on, at most"] == 300
    assert named["precision of a win rate near 50%"] == "about +- 6 points"
    held_out = sizes(f"data: {{prompts: {tmp_path}/p.jsonl, holdout: 0.2}}\nevaluate: {{}}\n")
    assert 40 < held_out["prompts to evaluate on, at most"] < 80
    limited = sizes("evaluate: {prompts: not-here.jsonl, max_prompts: 60}\n")
    assert limited["precision of a win rate near 50%"] == "about +- 12 points"
    assert "precision of a win rate near 50%" not in sizes("evaluate: {}\n")


def test_recipe_show_finds_prompts_beside_the_recipe(rlhf, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/p.jsonl").write_text("".join(json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(60)))
    recipe_of(tmp_path / "here", "evaluate: {prompts: p.jsonl}\n")
    shown = rlhf("recipe", "show", "here/r.yaml").stdout
    assert "#   evaluate: precision of a win rate near 50%: about +- 12 points" in shown
    plain = json.loads(rlhf("recipe", "show", "here/r.yaml", "--json").stdout)
    assert plain["derived"]["evaluate"]["prompts to evaluate on, at most"] == 60


@pytest.fixture
def reward_model(tiny_bert: Path, tmp_path: Path) -> Path:
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=1)
    with torch.no_grad():
        weight: Any = model.classifier.weight
        weight.normal_(std=5.0)
    model.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


def test_best_of_n_of_a_model_is_a_policy(rlhf_here, tiny_llama, others, files, reward_model, tmp_path):
    """Each of its completions is the reward model's best of the same draws that the plain policy makes."""
    shared = ("--set", f"evaluate.reward_model={reward_model}", "--run-dir")
    best = f'[{{model: "{others[0]}", best_of: 4}}, {{model: "{others[0]}", best_of: 3, name: three}}]'
    code, said = rlhf_here(
        *arguments(tiny_llama, others[0], "--demonstrations", "d.jsonl"), "--set", f"evaluate.policies={best}",
        "--set", "evaluate.samples_per_prompt=1", *shared, "best",
    )  # fmt: skip
    assert code == 0, said
    code, said = rlhf_here(
        *arguments(tiny_llama, others[0]), "--set", "evaluate.samples_per_prompt=4", *shared, "plain"
    )
    assert code == 0, said
    rows, plain = results(tmp_path / "best/evaluate")[2], results(tmp_path / "plain/evaluate")[2]
    name = f"best of 4 of {others[0].name}"
    for number, row in enumerate(rows):
        draws = plain[4 * number : 4 * number + 4]
        rewards = [draw["reward_policy"] for draw in draws]
        assert row["policy"] == draws[0]["policy"]
        assert row["policies"][name]["reward"] == pytest.approx(max(rewards), abs=1e-5)
        assert row["policies"][name]["completion"] == draws[rewards.index(max(rewards))]["policy"]
        assert row["policies"]["three"]["reward"] == pytest.approx(max(rewards[:3]), abs=1e-5)
    evaluation, metrics, _ = results(tmp_path / "best/evaluate")
    measures = evaluation["models"][name]
    assert measures["kl_upper_bound"]["value"] == pytest.approx(math.log(4) - 3 / 4)
    assert "an upper bound" in measures["kl_upper_bound"]["missing"]
    assert not {"entropy", "perplexity"} & set(measures), "those of the model are not those of its best completions"
    assert [("kl_nats" in pair) for pair in evaluation["pairs"][:3]] == [True, False, False]
    assert f"{name}/kl_nats" not in metrics


def test_scores_of_draws_outlive_a_kill(rlhf_here, tiny_llama, others, files, reward_model, tmp_path, monkeypatch):
    best = f'[{{model: "{others[0]}", best_of: 4}}]'
    given = (
        *arguments(tiny_llama, others[1]), "--set", f"evaluate.policies={best}", "--set",
        f"evaluate.reward_model={reward_model}", "--run-dir",
    )  # fmt: skip
    assert rlhf_here(*given, "whole")[0] == 0
    with monkeypatch.context() as patched:
        patched.setattr("rlhf_cli.stages.evaluate.sampling.Sampler.best", stopped_after(Sampler.best))
        assert rlhf_here(*given, "killed")[0] == 130
    work = tmp_path / "killed/.evaluate.work"
    before = (work / "policy_2_rewards.jsonl").read_bytes()
    assert (work / "policy_2.jsonl").is_file()
    assert len(before) > 0
    assert rlhf_here(*given, "killed")[0] == 0
    whole, again = (tmp_path / f"{name}/evaluate/samples.jsonl" for name in ("whole", "killed"))
    assert whole.read_bytes() == again.read_bytes()


def stopped_after(function):
    def stopped(*given, **named):
        function(*given, **named)
        raise Interrupted(signal.SIGINT)

    return stopped


def test_best_of_n_without_a_reward_model_is_refused(rlhf_here, tiny_llama, others, files):
    best = f'[{{model: "{others[0]}", best_of: 4}}]'
    code, said = rlhf_here(*arguments(tiny_llama, others[1]), "--set", f"evaluate.policies={best}")
    assert code == 2
    assert "`best_of` of `evaluate.policies` takes the best by a reward model, and there is none" in said
    assert "--set evaluate.reward_model=PATH" in said
