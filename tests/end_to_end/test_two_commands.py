"""Two commands in a row, without a recipe: the second prompts, samples, stops and splits as the first did."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_cli.data.records import split_key
from rlhf_cli.data.splits import Split
from rlhf_cli.generation.contract import Contract, read_contract
from rlhf_cli.generation.generator import Request
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.prompts import PromptStyle
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.torch_generator import TorchGenerator
from rlhf_cli.models.loading import ModelSource
from tests import preloaded

PAGE = Path(__file__).resolve().parents[2] / "docs" / "contract.md"
STOP = "."
FIRST = {
    "data.prompt_template": r'"Q: {prompt}\nA:"',
    "data.holdout": "0.3",
    "data.split_seed": "5",
    "sampling.temperature": "0.8",
    "sampling.max_new_tokens": "9",
    "sampling.stop_tokens": json.dumps([STOP]),
}
FAST = {
    "model.precision": "float32",
    "data.max_skip": "0.5",
    "sft.adapter": "none",
    "sft.epochs": "12",
    "sft.learning_rate": "5e-3",
    "train_rm.epochs": "1",
    "ppo.steps": "2",
    "ppo.prompts_per_step": "4",
    "ppo.epochs": "1",
    "label.completions_per_prompt": "2",
}
PROMPTS = [f"What is {thing} number {n}?" for n in range(20) for thing in ("bread", "the sky")]
ROWS = {
    "prompts": [{"prompt": text} for text in PROMPTS],
    "demonstrations": [{"prompt": text, "completion": f" {text[:9]} is good."} for text in PROMPTS],
    "rankings": [{"prompt": text, "chosen": " It is good.", "rejected": " No"} for text in PROMPTS],
}
GOLD = "def score(prompts, completions):\n    return [c.count('e') - len(c) / 99 for c in completions]\n"
DATA = ("--prompts", "prompts.jsonl", "--function", "gold.py:score")
SKIP = {"evaluate.trained_prompts": "skip"}

PAIRS = {
    ("sft", "label"): ("after-sft", "label"),
    ("sft", "train-rm"): ("after-sft", "train-rm"),
    ("sft", "ppo"): ("after-sft", "ppo"),
    ("sft", "evaluate"): ("after-sft", "evaluate"),
    ("label", "train-rm"): ("after-label", "train-rm"),
    ("train-rm", "label"): ("after-rm", "label"),
    ("train-rm", "ppo"): ("after-rm", "ppo"),
    ("train-rm", "evaluate"): ("after-rm", "evaluate"),
    ("ppo", "label"): ("after-ppo", "label"),
    ("ppo", "train-rm"): ("after-ppo", "train-rm"),
    ("ppo", "ppo"): ("after-ppo", "ppo"),
    ("ppo", "evaluate"): ("after-ppo", "evaluate"),
}
"""(first command, second command) -> run directory and stage of what the second wrote."""


class Commands:
    """Runs stages alone, each in the run directory that it is given."""

    def __init__(self, folder: Path, base: Path) -> None:
        self._folder, self.base = folder, base
        for name, records in ROWS.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
        (folder / "gold.py").write_text(GOLD)

    def run(self, stage: str, run: str, *arguments: object, code: int = 0, **settings: str) -> str:
        """Return what the command prints to stderr."""
        sections = (stage.replace("-", "_"), "data", "model", "sampling")
        fast = {name: value for name, value in FAST.items() if name.split(".")[0] in sections}
        chosen = fast | settings if stage != "run" else settings
        options = [part for name, value in chosen.items() for part in ("--set", f"{name}={value}")]
        variables = os.environ | {"CI": "1", "OMP_NUM_THREADS": "1"}
        found = preloaded.run([stage, *arguments, "--run-dir", run, *options], cwd=self._folder, env=variables)
        assert found.returncode == code, f"{found.args}\n{found.stderr}"
        return found.stderr

    def write(self, name: str, text: str) -> None:
        (self._folder / name).write_text(text)

    def artifact(self, run: str, stage: str) -> Path:
        return self._folder / run / stage

    def contract(self, run: str, stage: str) -> Contract:
        found = read_contract(self.artifact(run, stage))
        assert found is not None, (run, stage)
        return found

    def evaluated(self) -> dict[str, list[dict]]:
        """Run directory -> samples of its evaluation."""
        runs = [run for run, stage in PAIRS.values() if stage == "evaluate"]
        files = {run: self.artifact(run, "evaluate") / "samples.jsonl" for run in runs}
        return {run: [json.loads(line) for line in file.read_text().splitlines()] for run, file in files.items()}


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Commands:
    made = Commands(tmp_path_factory.mktemp("two"), tiny_llama)
    made.run("sft", "first", "--model", tiny_llama, "--data", "demonstrations.jsonl", **FIRST)
    sft, policy = made.artifact("first", "sft"), made.artifact("after-sft", "ppo")
    for run, start in (("after-sft", sft), ("after-ppo", policy)):
        made.run("ppo", run, "--model", start, *DATA, **{"ppo.adapter": "none" if start is sft else "lora"})
        made.run("label", run, "--by", "function", "--model", start, *DATA)
        made.run("train-rm", run, "--model", start, "--data", "rankings.jsonl")
        made.run("evaluate", run, "--baseline", sft, "--policy", start, *DATA, **SKIP)
    made.run("train-rm", "after-label", "--model", sft, "--data", made.artifact("after-sft", "label"))
    model = ("--reward-model", made.artifact("after-sft", "train-rm"), "--prompts", "prompts.jsonl")
    made.run("ppo", "after-rm", "--model", sft, *model)
    made.run("label", "after-rm", "--by", "reward-model", "--model", sft, *model)
    made.run("evaluate", "after-rm", "--baseline", sft, "--policy", policy, *model, **SKIP)
    return made


def agreement(first: Contract, second: Contract) -> list[bool]:
    """Whether template, stop tokens, temperature and length, and split are equal."""
    one, two = Sampling.resolve(first.sampling), Sampling.resolve(second.sampling)
    return [
        (first.prompt_template, first.template_kwargs) == (second.prompt_template, second.template_kwargs),
        one.stop_tokens == two.stop_tokens,
        (one.temperature, one.top_p, one.max_new_tokens) == (two.temperature, two.top_p, two.max_new_tokens),
        first.split == second.split,
    ]


def table(rows: Sequence[tuple[tuple[str, str], list[bool]]]) -> str:
    lines = ["| first | second | template | stop tokens | temperature, length | split |", "|---|---|---|---|---|---|"]
    for (first, second), found in rows:
        cells = " | ".join("equal" if one else "differs" for one in found)
        lines.append(f"| `{first}` | `{second}` | {cells} |")
    return "\n".join(lines)


def test_the_second_command_does_as_the_first_did(commands: Commands):
    first = commands.contract("first", "sft")
    assert first.prompt_template == "Q: {prompt}\nA:"
    assert Sampling.resolve(first.sampling) == Sampling(0.8, 1.0, 9, (STOP,))
    assert (first.split.holdout, first.split.seed) == (0.3, 5)
    wrote = {"sft": first, **{stage: commands.contract("after-sft", stage) for stage in ("label", "train-rm", "ppo")}}
    rows = [(pair, agreement(wrote[pair[0]], commands.contract(*place))) for pair, place in PAIRS.items()]
    assert all(all(found) for _, found in rows), table(rows)
    assert table(rows) in PAGE.read_text(encoding="utf-8"), f"docs/contract.md should hold\n{table(rows)}"


def test_completions_end_at_the_inherited_stop_token_and_length(commands: Commands):
    tokenizer = AutoTokenizer.from_pretrained(commands.artifact("first", "sft"))
    stop = tokenizer(STOP, add_special_tokens=False).input_ids
    for rows in commands.evaluated().values():
        for row in rows:
            for side in ("baseline", "policy"):
                ids = tokenizer(row[side], add_special_tokens=False).input_ids
                assert stop[0] not in ids[:-1], row
                assert row[f"tokens_{side}"] <= 9


def test_no_prompt_is_on_two_sides(commands: Commands):
    places = [("first", "sft"), *PAIRS.values()]
    trained = frozenset[str]().union(*(commands.contract(*place).trained_prompts for place in places))
    evaluated = {split_key(row["prompt"]) for rows in commands.evaluated().values() for row in rows}
    assert evaluated
    assert evaluated.isdisjoint(trained)
    assert evaluated | trained == {split_key(prompt) for prompt in PROMPTS}


def test_evaluating_on_training_prompts_is_refused_with_their_number(commands: Commands):
    models = ("--baseline", commands.artifact("first", "sft"), "--policy", commands.artifact("after-sft", "ppo"))
    refused = commands.run("evaluate", "refused", *models, *DATA, code=65)
    counts = {commands.artifact(*one): commands.contract(*one) for one in (("first", "sft"), ("after-sft", "ppo"))}
    assert any(
        f": {len(contract.trained_prompts)} of its prompts were in the training of {model}" in refused
        for model, contract in counts.items()
    ), refused
    assert "--set evaluate.trained_prompts=skip" in refused
    # Held out by another seed, or in a larger share than in training.
    for other in ({"data.split_seed": "6"}, {"data.holdout": "0.8"}):
        settings = other | {"data.prompts": "prompts.jsonl"}
        refused = commands.run("evaluate", "refused", *models, *DATA[2:], code=65, **settings)
        assert "prompts to evaluate on were in the training" in refused


def test_a_run_that_would_evaluate_on_training_prompts_ends_before_it_trains(commands: Commands):
    recipe = f"""
model: {{path: {commands.base}, precision: float32}}
data: {{prompts: prompts.jsonl, holdout: 0.3}}
sft: {{data: demonstrations.jsonl}}
ppo: {{steps: 1, rewards: [{{function: "gold.py:score"}}]}}
evaluate: {{prompts: other.jsonl, judge_function: "gold.py:score"}}
"""
    commands.write("recipe.yaml", recipe)
    # Of 40 questions in another form, those that the split does not hold out are trained on.
    rows = [{"prompt": [{"role": "user", "content": f" {text.upper()}"}]} for text in PROMPTS]
    commands.write("other.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    trained = sum(not Split(0.3, 0).holds_out(prompt) for prompt in PROMPTS)
    refused = commands.run("run", "whole", "recipe.yaml", code=65)
    assert f"{trained} of its prompts are in the training share of `sft.data`" in refused
    assert "starting" not in refused
    commands.run("run", "whole", "recipe.yaml", "--dry-run", **{"evaluate.trained_prompts": "skip"})


def test_a_recipe_that_contradicts_the_model_is_refused_or_named(commands: Commands):
    model = ("--by", "function", "--model", commands.artifact("after-sft", "ppo"), *DATA)
    # A refused stage leaves nothing to resume, whatever it decided and measured before.
    precision = {"model.precision": "auto"}
    other = {"data.prompt_template": '"> {prompt}"'} | precision
    assert "was trained with prompts as" in commands.run("label", "x", *model, code=2, **other)
    named = commands.run("label", "x", *model, **{"label.sampling.temperature": "1.5"} | precision)
    assert "label samples with other settings than the training of" in named
    assert "temperature 1.5 (training: 0.8)" in named
    dropped = commands.run("label", "y", *model, **{"sampling.stop_tokens": "[]"})
    assert "stop_tokens none (training: '.')" in dropped
    lines = (commands.artifact("y", "label") / "rankings.jsonl").read_text().splitlines()
    texts = [completion for line in lines for completion in json.loads(line)["completions"]]
    assert any(STOP in text[:-1] for text in texts), "they go on after the stop token that the recipe dropped"


def test_a_stop_token_of_the_policy_stops_the_baseline_too(commands: Commands):
    """Also one that is dropped or replaced: both sides of an evaluation end completions in the same way."""
    folders = (commands.artifact("first", "sft"), commands.artifact("after-sft", "ppo"), commands.base)
    for stops in ((), (STOP,), ("?",)):
        found = [Policy.load(ModelSource(str(folder)), Sampling(stop_tokens=stops)).stop_ids for folder in folders]
        assert found[0] == found[1] == found[2]


def test_a_change_of_sampling_does_not_train_the_sft_model_again(commands: Commands):
    model = ("--model", commands.base, "--data", "demonstrations.jsonl")
    assert "up to date" in commands.run("sft", "first", *model, **FIRST | {"sampling.temperature": "0.5"})


def test_a_wrong_stop_token_ends_a_stage_before_it_trains(commands: Commands):
    model = ("--model", commands.base, "--data", "demonstrations.jsonl")
    refused = commands.run("sft", "wrong", *model, code=2, **{"sampling.stop_tokens": '["two tokens"]'})
    assert "'two tokens' is" in refused
    assert "fine-tuning" not in refused


@pytest.mark.parametrize("place", [("first", "sft"), ("after-sft", "ppo"), ("after-rm", "ppo")], ids=str)
def test_plain_transformers_draws_from_the_same_distribution(place: tuple[str, str], commands: Commands):
    """`generate` with the folder's own generation config: the same stops, and the same first and second tokens by
    chi-square tests of homogeneity at the level 0.001. Of SFT, of PPO in full and of PPO with an adapter."""
    folder, draws = commands.artifact(*place), 4_000
    contract = commands.contract(*place)
    sampling = Sampling.resolve(contract.sampling)
    policy = Policy.load(ModelSource(str(folder)), sampling, style=PromptStyle(contract.prompt_template))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ends = model.generation_config.eos_token_id
    assert set(ends if isinstance(ends, list) else [ends]) == policy.stop_ids
    without = Policy.load(ModelSource(str(folder)), Sampling())
    assert without.stop_ids < policy.stop_ids, "a stop token is a setting, which the next stage may drop"
    assert model.generation_config.max_new_tokens == 9

    prompt = policy.prompt_ids(PROMPTS[0])
    ours = TorchGenerator().generate(policy, [Request(prompt, seed) for seed in range(draws)])
    torch.manual_seed(1)
    with torch.no_grad():
        theirs = model.generate(torch.tensor([prompt] * draws), attention_mask=torch.ones(draws, len(prompt)).long())
    sides = [[one.ids for one in ours], theirs[:, len(prompt) :].tolist()]
    for position in (0, 1):
        found = [[row[position] for row in rows if position == 0 or row[0] not in policy.stop_ids] for rows in sides]
        assert chi_square(*found) < 1.0, position


def chi_square(one: Sequence[int], other: Sequence[int]) -> float:
    """Return the statistic for two samples of tokens as a share of its critical value at the level 0.001.

    Cells with fewer than 10 draws in all are pooled. The critical value is Wilson and Hilferty's approximation (1931).
    """
    counted = Counter(one), Counter(other)
    counts = [[side[token] for side in counted] for token in counted[0].keys() | counted[1].keys()]
    cells = [pair for pair in counts if sum(pair) >= 10]
    rest = [pair for pair in counts if sum(pair) < 10]
    if rest:
        cells.append([sum(pair[side] for pair in rest) for side in (0, 1)])
    totals = [sum(cell[side] for cell in cells) for side in (0, 1)]
    degrees = len(cells) - 1
    assert degrees > 5
    statistic = 0.0
    for cell in cells:
        for side in (0, 1):
            expected = sum(cell) * totals[side] / sum(totals)
            statistic += (cell[side] - expected) ** 2 / expected
    return statistic / (degrees * (1 - 2 / (9 * degrees) + 3.0902 * (2 / (9 * degrees)) ** 0.5) ** 3)


def test_the_chi_square_test_finds_another_temperature(commands: Commands):
    folder = commands.artifact("first", "sft")
    draws = []
    for temperature in (0.8, 1.4):
        sampling = Sampling(temperature=temperature, max_new_tokens=1)
        policy = Policy.load(ModelSource(str(folder)), sampling, style=PromptStyle("Q: {prompt}\nA:"))
        prompt = policy.prompt_ids(PROMPTS[0])
        completions = TorchGenerator().generate(policy, [Request(prompt, seed) for seed in range(4_000)])
        draws.append([completion.ids[0] for completion in completions])
    assert chi_square(*draws) > 1.5
