"""The `evaluate` stage, in process and through the real command."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_cli.data.records import seed_for
from rlhf_cli.data.splits import Split
from rlhf_cli.errors import DataError, Interrupted, ModelError
from rlhf_cli.generation.generator import Completion, Request, ignore
from rlhf_cli.generation.logprobs import completion_hidden
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.torch_generator import TorchGenerator
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.shared import BuildSettings
from rlhf_cli.stages.base import StageContext
from rlhf_cli.stages.evaluate import run as evaluate
from rlhf_cli.stages.inputs import Input
from rlhf_cli.stages.model_names import model_names
from tests.stages.context import stage_context
from tests.stops import StopAtCheck


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> str:
    """Counts letters `a`."""
    path = tmp_path_factory.mktemp("judge") / "judge.py"
    path.write_text("def score(prompts, completions):\n    return [float(c.count('a')) for c in completions]\n")
    return f"{path}:score"


@pytest.fixture(scope="module")
def lover_of_a(tiny_llama, tmp_path_factory) -> Path:
    """The same model, drawn to the letter `a`: what PPO against the judge would move to."""
    folder = tmp_path_factory.mktemp("models") / "lover"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    (token,) = tokenizer("a", add_special_tokens=False).input_ids
    hidden = model.model(tokenizer("Question 7?", return_tensors="pt").input_ids).last_hidden_state[0].mean(0).detach()
    with torch.no_grad():  # an output embedding of its own, along the hidden states
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.lm_head.weight[token] += 7.0 * hidden / hidden.square().sum()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {number}?"}) + "\n" for number in range(40)))
    return path


def context_of(tmp_path: Path, inputs: dict[str, str], *, holdout=0.3, seed=0, **settings) -> StageContext:
    section = {"sampling": {"max_new_tokens": 12}} | settings
    recipe = Recipe.model_validate(
        {
            "seed": seed,
            "model": {"precision": "float32", "device": "cpu"},
            "data": {"holdout": holdout} | section.pop("data", {}),
            "evaluate": section,
        }
    )
    for name in ("output", "work"):
        (tmp_path / name).mkdir(exist_ok=True)
    return stage_context("evaluate", recipe, output=tmp_path / "output", work=tmp_path / "work", **inputs)


def judged(tmp_path, sft, ppo, source, judge, **settings) -> StageContext:
    inputs = {"baseline": str(sft), "policy": str(ppo), "prompts": str(source), "judge_function": judge}
    return context_of(tmp_path, inputs, judge_function=judge, **settings)


def lines(context: StageContext) -> list[dict]:
    return [json.loads(line) for line in (context.output / "samples.jsonl").read_text().splitlines()]


def test_held_out_prompts_alone_and_every_figure_from_the_samples(
    tiny_llama, lover_of_a, prompts, judge, tmp_path, capsys
):
    context = judged(tmp_path, tiny_llama, lover_of_a, prompts, judge)
    metrics = evaluate.run(context).metrics
    rows = lines(context)
    assert {row["prompt"] for row in rows} == {p for n in range(40) if Split(0.3, 0).holds_out(p := f"Question {n}?")}
    assert metrics["prompts"] == len(rows)
    for name in ("baseline", "policy"):
        assert [row[f"gold_{name}"] for row in rows] == [row[name].count("a") for row in rows]
        assert metrics[f"gold/{name}_mean"] == pytest.approx(sum(row[f"gold_{name}"] for row in rows) / len(rows))
        assert metrics[f"length/{name}_mean"] == pytest.approx(sum(row[f"tokens_{name}"] for row in rows) / len(rows))
    points = [
        (row["gold_policy"] > row["gold_baseline"]) + 0.5 * (row["gold_policy"] == row["gold_baseline"]) for row in rows
    ]
    assert metrics["win_rate"] == pytest.approx(sum(points) / len(rows))
    assert metrics["win_rate"] > 0.6
    assert metrics["kl_nats"] == pytest.approx(sum(row["kl_nats"] for row in rows) / len(rows))
    assert metrics["kl_nats"] > 0
    assert json.loads((context.output / "metrics.json").read_text()) == metrics
    (pair,) = json.loads((context.output / "evaluation.json").read_text())["pairs"]
    assert pair["outcomes"] == {"wins": points.count(1.0), "ties": points.count(0.5), "losses": points.count(0.0)}
    assert pair["identical_share"] == sum(row["baseline"] == row["policy"] for row in rows) / len(rows)
    shown = capsys.readouterr().err
    assert "policy preferred" in shown
    assert ("too few to say" in shown) is (metrics["win_rate_low"] <= 0.5 <= metrics["win_rate_high"])
    assert all(len(line) <= 100 for line in shown.splitlines() if not line.startswith("warning:"))
    assert tiny_llama.name in shown, "the table says which models these are"
    assert lover_of_a.name in shown


def test_a_model_against_itself_is_a_tie_at_kl_0(tiny_llama, prompts, judge, tmp_path, capsys):
    context = judged(tmp_path, tiny_llama, tiny_llama, prompts, judge)
    metrics = evaluate.run(context).metrics
    said = " ".join(capsys.readouterr().err.split())
    name = tiny_llama.name
    assert f"{metrics['prompts']:.0f} prompts are too few to say which of {name} (policy) and {name} is better" in said
    assert f"evaluate: {metrics['prompts']:.0f} prompts: a win rate near 50% will be known to about +- " in said
    assert "about 100 give an interval of +-10 points: raise `data.holdout` or set `evaluate.prompts`" in said
    assert metrics["win_rate"] == 0.5
    assert metrics["tie_rate"] == 1.0, "the same seeds for both"
    assert metrics["kl_nats"] == pytest.approx(0.0, abs=1e-6)
    assert all(row["baseline"] == row["policy"] for row in lines(context))


@pytest.mark.parametrize("checks", [2, 9])
def test_a_signal_ends_sampling_and_reading_within_a_batch(tiny_llama, prompts, judge, tmp_path, checks):
    plan = {"max_new_tokens": 4, "batch_size": 2}
    context = judged(tmp_path, tiny_llama, tiny_llama, prompts, judge, sampling=plan)
    context = dataclasses.replace(context, stop=StopAtCheck(checks))
    with pytest.raises(Interrupted):
        evaluate.run(context)
    assert context.stop.asked == checks


def test_the_seed_decides_the_completions(tiny_llama, prompts, judge, tmp_path):
    completions = []
    for number, seed in enumerate((1, 1, 2)):
        (tmp_path / str(number)).mkdir()
        context = judged(
            tmp_path / str(number), tiny_llama, tiny_llama, prompts, judge, seed=seed, prompts=str(prompts)
        )
        evaluate.run(context)
        completions.append([row["baseline"] for row in lines(context)])
    assert completions[0] == completions[1]
    assert completions[0] != completions[2]


def policy_at(folder: Path, attention: str = "auto", **sampling) -> Policy:
    return Policy.load(ModelSource(str(folder), attention=attention), Sampling(**sampling))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_log_probabilities_are_those_of_the_whole_completion_with_its_end(tiny_llama, batch_size):
    policy = policy_at(tiny_llama, temperature=0.7, batch_size=batch_size)
    end = policy.format.tokenizer.eos_token_id
    prompts = [[5, 6, 7], [5]]
    completions = [Completion([8, 9, end], "", True), Completion([10], "", False)]
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        with policy.model() as model:
            logits = model(torch.tensor([prompt + completion.ids])).logits[0] / 0.7
        rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        expected.append(sum(row[token].item() for row, token in zip(rows, completion.ids, strict=True)))
    assert policy.logprobs(prompts, completions) == pytest.approx(expected, abs=1e-4)


def test_completions_of_one_prompt_are_read_together(tiny_llama, monkeypatch):
    policy = policy_at(tiny_llama, "torch", batch_size=3)
    prompts = [[5, 6, 7], [40, 41, 42], [60, 61]] * 3
    completions = [Completion([8 + length] * length, "", True) for length in (1, 4, 9) for _ in range(3)]
    batches = []

    def watched(model, batch):
        batches.append(batch)
        return completion_hidden(model, batch)

    monkeypatch.setattr("rlhf_cli.generation.policy.completion_hidden", watched)
    found = policy.logprobs(prompts, completions)
    assert [batch.layout.is_tree for batch in batches] == [True] * 3
    assert sum(batch.input_ids.numel() for batch in batches) == 3 + 3 + 2 + 3 * (1 + 4 + 9)
    padded = policy_at(tiny_llama, "sdpa", batch_size=3)
    assert found == pytest.approx(padded.logprobs(prompts, completions), abs=1e-4)


def test_kl_is_an_unbiased_estimate(tiny_llama, lover_of_a):
    """One-token completions: the mean of log pi - log pi_baseline nears the exact sum over the vocabulary."""
    baseline, policy = (policy_at(folder, max_new_tokens=1, batch_size=500) for folder in (tiny_llama, lover_of_a))
    ids = policy.prompt_ids("Question?")
    requests = [Request(ids, seed_for("Question?", 0, number)) for number in range(3000)]
    completions = TorchGenerator().generate(policy, requests)
    own, other = (one.logprobs([ids] * 3000, completions) for one in (policy, baseline))
    logprobs = []
    for one in (policy, baseline):
        with one.model() as model:
            logprobs.append(model(torch.tensor([ids])).logits[0, -1].detach().log_softmax(-1))
    p, q = logprobs
    exact = float((p.exp() * (p - q)).sum())
    assert exact > 0.03
    estimate = sum(one - two for one, two in zip(own, other, strict=True)) / 3000
    spread = float((p.exp() * (p - q - exact) ** 2).sum()) ** 0.5
    assert estimate == pytest.approx(exact, abs=4 * spread / 3000**0.5)


def test_a_reward_model_judges_where_there_is_no_function(tiny_llama, lover_of_a, prompts, tmp_path, capsys):
    torch.manual_seed(5)
    AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1).save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "rm")
    inputs = {
        "baseline": str(tiny_llama),
        "policy": str(lover_of_a),
        "prompts": str(prompts),
        "reward_model": str(tmp_path / "rm"),
    }
    context = context_of(tmp_path, inputs)
    metrics = evaluate.run(context).metrics
    assert "gold/policy_mean" not in metrics
    assert metrics["reward/difference"] == pytest.approx(
        metrics["reward/policy_mean"] - metrics["reward/baseline_mean"]
    )
    assert metrics["reward/difference_se"] > 0
    for row in lines(context):
        gap = row["reward_policy"] - row["reward_baseline"]
        is_tie = gap == 0 or row["policy"] == row["baseline"]
        assert row["winner"] == ("tie" if is_tie else "policy" if gap > 0 else "baseline")
    assert any(row["winner"] != "tie" for row in lines(context))
    assert "a check of training" in capsys.readouterr().err


def test_the_base_model_completes_the_prompts_that_are_shown(tiny_llama, lover_of_a, prompts, judge, tmp_path, capsys):
    shutil.copytree(tiny_llama, tmp_path / "base")
    context = judged(tmp_path, tiny_llama, lover_of_a, prompts, judge, shown_samples=3)
    base = Input("model", str(tmp_path / "base"))
    context = dataclasses.replace(context, inputs=dataclasses.replace(context.inputs, base=base))
    evaluate.run(context)
    with_base = [row for row in lines(context) if "base" in row]
    assert len(with_base) == 3
    assert all(row["base"] == row["baseline"] for row in with_base), (
        "here the base is the baseline, with the same seeds"
    )
    assert all(row["base_score"] == row["base"].count("a") for row in with_base)
    assert capsys.readouterr().err.count("base ") >= 3


def test_a_base_that_cannot_be_drawn_from_is_released_with_a_warning(
    tiny_llama, lover_of_a, prompts, judge, tmp_path, capsys, monkeypatch
):
    """As one of another size than the model that a vLLM engine or server holds."""
    base = str(shutil.copytree(tiny_llama, tmp_path / "base"))
    released, release, draw = [], Policy.release, TorchGenerator.generate

    def refusing(generator: TorchGenerator, policy: Policy, *given: object, **named: object) -> list[Completion]:
        if policy.source.path == base:
            raise ModelError("another size")
        return draw(generator, policy, *given, **named)

    monkeypatch.setattr(TorchGenerator, "generate", refusing)
    monkeypatch.setattr(Policy, "release", lambda policy: released.append(policy.source.path) or release(policy))
    context = judged(tmp_path, tiny_llama, lover_of_a, prompts, judge, shown_samples=3)
    context = dataclasses.replace(context, inputs=dataclasses.replace(context.inputs, base=Input("model", base)))
    evaluate.run(context)
    assert base in released
    assert "completions of the base model are not shown: another size" in capsys.readouterr().err


def test_a_built_base_is_made_again_from_the_seed(tmp_path):
    from rlhf_cli.models.build import build_model

    build = BuildSettings(hidden_size=32, layers=1, heads=2, feed_forward_size=48, vocab_size=300, context_length=64)
    build_model(tmp_path / "built", ["some text to learn from"] * 20, build, seed=11)
    source, sampling = ModelSource(str(tmp_path / "built")), Sampling()
    logits = []
    for policy in (
        Policy.load(source, sampling),
        Policy.untrained(source, sampling, seed=11),
        Policy.untrained(source, sampling, seed=12),
    ):
        with policy.model() as model:
            logits.append(model(torch.tensor([[5, 6, 7]])).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_models_that_read_text_differently_have_no_kl(tiny_llama, tiny_gpt2, tiny_t5, prompts, judge, tmp_path, capsys):
    context = judged(tmp_path, tiny_t5, tiny_llama, prompts, judge, data={"prompt_template": None})
    assert "kl_nats" not in evaluate.run(context).metrics
    assert "read text differently" in capsys.readouterr().err


def test_an_encoder_decoder_is_evaluated_too(tiny_t5, prompts, judge, tmp_path):
    assert evaluate.run(judged(tmp_path, tiny_t5, tiny_t5, prompts, judge)).metrics["kl_nats"] == pytest.approx(
        0, abs=1e-5
    )


def test_several_samples_and_few_prompts(tiny_llama, lover_of_a, prompts, judge, tmp_path):
    context = judged(tmp_path, tiny_llama, lover_of_a, prompts, judge, samples_per_prompt=3, max_prompts=4)
    metrics = evaluate.run(context).metrics
    assert (metrics["prompts"], metrics["completions"]) == (4, 12)
    completions = [row["baseline"] for row in lines(context)]
    assert len(set(completions[:3])) == 3, "completions of one prompt differ"


def test_nothing_held_out_is_an_error(tiny_llama, prompts, judge, tmp_path):
    with pytest.raises(DataError, match="held out"):
        evaluate.run(judged(tmp_path, tiny_llama, tiny_llama, prompts, judge, holdout=0.0))


def test_escape_sequences_in_completions_do_not_reach_the_terminal():
    from rich.console import Console

    from rlhf_cli.stages.evaluate.comparison import Comparison
    from rlhf_cli.stages.evaluate.tables import side_by_side

    bad = Completion([2], "\x1b[2Jgone \x1b]0;owned\x07[bold]kept[/bold]", True)
    console = Console(width=80, record=True, file=io.StringIO(), force_terminal=False)
    console.print(side_by_side(Comparison("p\x1b[31m", bad, bad, None, (0.0, 1.0), None), 0.0, number=1))
    text = console.export_text()
    assert "\x1b" not in text
    assert "owned" not in text
    assert "[bold]kept[/bold]" in text, "completions are not markup"


def test_the_real_command_needs_no_recipe(rlhf, tiny_llama, lover_of_a, prompts, judge):
    result = rlhf(
        "evaluate", "--baseline", tiny_llama, "--policy", lover_of_a, "--prompts", prompts, "--function", judge,
        "--run-dir", "run", "--set", "evaluate.sampling.max_new_tokens=12", "--json",
    )  # fmt: skip
    metrics = json.loads(result.stdout)["metrics"]
    for name in ("gold/baseline_mean", "gold/policy_mean", "win_rate", "win_rate_low", "win_rate_high", "kl_nats"):
        assert name in metrics
    assert metrics["prompts"] == 40, "prompts that are named are all used"
    assert "Traceback" not in result.stderr


def test_models_are_called_by_run_and_stage_and_apart(tmp_path, monkeypatch):
    for folder in ("runs/a/ppo", "runs/b/ppo", "other/a/ppo", "models/base"):
        (tmp_path / folder).mkdir(parents=True)
        if folder != "models/base":
            (tmp_path / folder / "manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert model_names("runs/a/ppo", f"{tmp_path}/runs/b/ppo") == ("a/ppo", "b/ppo")
    assert model_names("models/base", "acme/chat") == ("base", "acme/chat")
    assert model_names("runs/a/ppo", "other/a/ppo") == ("runs/a/ppo", "other/a/ppo")
    assert model_names("runs/a/ppo", "runs/a/ppo") == ("a/ppo", "a/ppo")
    (tmp_path / "runs/a/ppo/steps/20").mkdir(parents=True)
    assert model_names("runs/a/ppo/steps/20") == ("a/ppo/steps/20",)
    (tmp_path / "copied/steps/20").mkdir(parents=True)
    (tmp_path / "checkpoints/4").mkdir(parents=True)
    assert model_names("copied/steps/20", "checkpoints/4") == ("copied/steps/20", "checkpoints/4"), "never just 20"
    assert model_names("/") == ("",), "a model directly below the root has no run"


def test_the_table_fits_80_columns_with_long_names():
    from rich.console import Console

    from rlhf_cli.stages.evaluate.comparison import Comparison, comparison_metrics
    from rlhf_cli.stages.evaluate.tables import metrics_table

    one = Completion([5, 6], "some text", finished=True)
    metrics = comparison_metrics(
        [Comparison(str(n), one, one, 1.0, (0.0, 1.0), None) for n in range(9)], tie_margin=0.0
    )
    screen = io.StringIO()
    names = ("acme/a-very-long-name-of-a-model-1", "runs/experiment-17/ppo")
    Console(width=80, file=screen).print(metrics_table(metrics, names))
    text = screen.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "policy preferred (ties 1/2)" in text
    assert "KL to baseline, nats per completion" in text
    assert "acme/a-very-long-n" in text, "folded, not cut"


class Counting:
    """Draws completions as the real generator does, and stops the run before batch `last` + 1."""

    def __init__(self, last: int | None = None) -> None:
        self.batches, self._last = 0, last

    def generate(self, policy, requests, *, progress=ignore, stop=lambda: None) -> list[Completion]:
        if self.batches == self._last:
            raise Interrupted(signal.SIGTERM)
        self.batches += 1
        return TorchGenerator().generate(policy, requests, progress=progress, stop=stop)


@pytest.mark.parametrize("batches", [0, 1, 4])
def test_an_interrupted_evaluation_goes_on_after_the_last_batch(
    batches, tiny_llama, lover_of_a, prompts, judge, tmp_path
):
    settings = {"sampling": {"max_new_tokens": 6, "batch_size": 5}, "samples_per_prompt": 2}
    folders = [tmp_path / name for name in ("whole", "cut")]
    for folder in folders:
        folder.mkdir()
    whole, cut = (judged(folder, tiny_llama, lover_of_a, prompts, judge, **settings) for folder in folders)
    counting = Counting()
    metrics = evaluate.run(whole, counting).metrics
    with pytest.raises(Interrupted, match="finished steps and batches are saved"):
        evaluate.run(cut, Counting(batches))
    rest = Counting()
    assert evaluate.run(cut, rest).metrics == metrics
    assert rest.batches == counting.batches - batches
    assert lines(cut) == lines(whole)
    assert any(row["policy"] != row["baseline"] for row in lines(whole)), "each model has its own file"
