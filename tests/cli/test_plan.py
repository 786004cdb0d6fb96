"""`rlhf plan`: what it counts, what it measures, and what it says to change."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_cli.cli.plan_report import plan_json, show_plan
from rlhf_cli.models.model_shape import ModelShape
from rlhf_cli.models.resources import CPU_PROCESS, Extent, MemoryNeed
from rlhf_cli.pipeline import plan as planning
from rlhf_cli.pipeline.plan import plan_run
from rlhf_cli.pipeline.plan_advice import accepted_by, advise
from rlhf_cli.pipeline.prediction import Took
from rlhf_cli.pipeline.run_plan import RunPlan, StagePlan
from rlhf_cli.pipeline.selection import Selection
from rlhf_cli.recipe.loader import load_recipe
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages import registry
from rlhf_cli.stages.trial import Rates
from rlhf_cli.stages.workload import Work, Workload, count_passes, drawing, scoring, spread

ROOT = Path(__file__).parents[2]
LIMIT = CPU_PROCESS + 50_000
"""Bytes of memory in which no stage of the tiny model fits."""
SHAPE = ModelShape(
    weights=1_900, layers=2, hidden=8, feed_forward=16, queries=8, keys=4, vocabulary=100, embeddings=800, stored=3_800
)


def test_the_quickstart_is_counted_without_a_trial(tmp_path: Path):
    loaded = load_recipe(ROOT / "recipes/quickstart.yaml", [])
    found = plan_run(loaded, tmp_path / "run", Selection(), trial=False)
    stages = {stage.name: stage for stage in found.stages}
    assert list(stages) == ["sft", "label", "train-rm", "ppo", "evaluate"]
    assert found.seconds is None
    sft, labels, ppo = (stages[name].workload for name in ("sft", "label", "ppo"))
    assert sft is not None
    assert labels is not None
    assert ppo is not None
    assert sft.optimizer_steps == -(-round(sft.records * 2.6) // 16)
    assert labels.tokens("draw") == labels.records * 8 * 48
    assert ppo.optimizer_steps == 40 * 2 * 2
    assert next(work.tokens for work in ppo.work if work.phase == "rollout") == 40 * 64 * 48
    assert not (tmp_path / "run").exists()
    for name in ("sft", "train-rm", "ppo"):
        memory = stages[name].memory
        assert memory is not None
        assert 0.5e9 < memory.total < 1.5e9, "a model of a few megabytes in a process"


def test_a_disturbed_trial_is_said_in_text_and_json_also_where_there_is_no_total(tmp_path: Path, capsys):
    fits = StagePlan("train-rm", "run", "", predicted={"update": Took(2.0)})
    large = StagePlan("ppo", "run", "", memory=MemoryNeed({"update": {"policy": 9}}), fits=False)
    for stages in ([fits], [fits, large]):
        plan = RunPlan(tmp_path / "run", stages, "cpu", 1, 1, True, others="other processes used 1.0 of 2 cores")
        show_plan(plan)
        assert capsys.readouterr().out.splitlines()[-1] == "warning: other processes used 1.0 of 2 cores"
        assert plan_json(plan)["trial_warning"] == plan.others
    assert plan_json(dataclasses.replace(plan, others=None))["trial_warning"] is None


@pytest.fixture
def small(tiny_llama: Path, tmp_path: Path) -> Path:
    """A recipe of three stages on a tiny model."""
    completions = (" Because it is warm.", " No.")
    rows = [{"prompt": f"Why {number}?", "chosen": completions[0], "rejected": completions[1]} for number in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        f"name: small\nmodel: {{path: {tiny_llama}, precision: float32, device: cpu}}\n"
        "data: {prompts: prompts.jsonl, holdout: 0.2}\nsampling: {max_new_tokens: 8}\n"
        "train_rm: {data: pairs.jsonl, batch_size: 4, normalize: false}\n"
        "ppo: {steps: 3, prompts_per_step: 4, minibatches: 2, epochs: 1}\n"
    )
    return recipe


def test_a_trial_gives_the_time_and_the_length_of_completions(small: Path, monkeypatch):
    monkeypatch.setattr(planning, "TRIAL_SECONDS", 0.5)
    found = plan_run(load_recipe(small, []), small.parent / "run", Selection())
    assert [stage.name for stage in found.stages] == ["train-rm", "ppo"]
    for stage in found.stages:
        assert stage.seconds is not None
        assert stage.seconds["update"] > 0
        assert stage.seconds["other"] > 0
    rewards, ppo = found.stages
    assert rewards.workload is not None
    assert rewards.workload.optimizer_steps == -(-rewards.workload.records // 4)
    assert ppo.rates is not None
    assert ppo.rates.mean is not None
    assert 4 < ppo.rates.mean <= 8, "few of the tokens of this model end a completion"
    assert found.seconds == pytest.approx(sum(sum(stage.seconds.values()) for stage in found.stages if stage.seconds))


def test_a_bar_shows_how_far_the_trials_are(small: Path, monkeypatch):
    shown: list[tuple[str, float, float | None, bool]] = []

    def within(units: float, doing: str, *, left: float | None, is_guess: bool) -> None:
        shown.append((doing, units, left, is_guess))

    bar = SimpleNamespace(within=within, advance=lambda: shown.append(("advance", 1.0, None, False)))
    begun: list[tuple[str, int]] = []

    def task(label: str, total: int, *_args: str, **_options: bool):
        begun.append((label, total))
        return nullcontext(bar)

    monkeypatch.setattr(planning, "TRIAL_SECONDS", 0.5)
    monkeypatch.setattr(planning, "task", task)
    plan_run(load_recipe(small, []), small.parent / "run", Selection())
    assert begun == [("measuring", 2)]
    number = [doing for doing, *_ in shown].index("advance")
    rewards, ppo = shown[:number], shown[number + 1 : -1]
    assert {doing.partition(":")[0] for doing, *_ in rewards} == {"train-rm"}
    assert "ppo: sampling" in [doing for doing, *_ in ppo]
    for rows in (rewards, ppo):
        assert [units for _, units, *_ in rows] == sorted(units for _, units, *_ in rows)
    assert rewards[0][2] is None, "nothing to go by yet"
    assert all(is_guess for *_, is_guess in rewards)
    assert all(left is not None and not is_guess for *_, left, is_guess in ppo), "a trial tells how long the next takes"


def test_the_command_says_what_does_not_fit_and_what_to_change(small: Path, rlhf_here, monkeypatch, capsys):
    monkeypatch.setattr("rlhf_cli.pipeline.plan.machine_memory", lambda device: LIMIT)
    code, said = rlhf_here("plan", small, "--no-trial", "--json", "--set", "ppo.adapter=none")
    assert code == 0, said
    found = plan_run(load_recipe(small, ["ppo.adapter=none"]), small.parent / "run", Selection(), trial=False)
    needs = [stage.memory.total for stage in found.stages if stage.memory is not None]
    assert all(need > LIMIT for need in needs)
    changes = [one.change for stage in found.stages for one in stage.advice]
    assert "ppo.adapter=lora" in changes
    assert any(change.startswith("train_rm.micro_batch_size=") for change in changes)


def test_a_stage_that_does_not_fit_leaves_no_total_time(small: Path, monkeypatch, capsys):
    monkeypatch.setattr("rlhf_cli.pipeline.plan.machine_memory", lambda device: LIMIT)
    found = plan_run(load_recipe(small, []), small.parent / "run", Selection())
    assert [stage.name for stage in found.too_large] == ["train-rm", "ppo"]
    rates = Rates(load=1, train=1, forward=1, per_weight=0, per_byte=0)
    stages = [dataclasses.replace(stage, rates=rates) for stage in found.stages]
    tried = dataclasses.replace(found, stages=stages, others=None)  # whatever else this machine does
    assert tried.seconds is None
    assert [stage.seconds for stage in tried.stages] == [None, None]
    fitting = dataclasses.replace(tried, stages=[dataclasses.replace(stage, fits=True) for stage in tried.stages])
    assert fitting.seconds
    show_plan(tried)
    *_, first, second, time = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("does not fit: `train-rm`, in `")
    assert second.startswith("does not fit: `ppo`, in `")
    assert time == "time: no total, because not all stages fit"


def test_more_rankings_than_are_checked_are_scored_again_to_normalize(tiny_bert: Path, small: Path):
    """An encoder cannot complete prompts: rewards are normalized over ranked completions, which may be other ones."""
    completions = (" Because it is warm.", " No.")
    rows = [{"prompt": f"Why {number}?", "chosen": completions[0], "rejected": completions[1]} for number in range(120)]
    (small.parent / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"train_rm.model={tiny_bert}", "train_rm.adapter=none", "ppo=null"]
    without, with_it = (
        _tokens("train-rm", "eval", small, small.parent / "run", *settings, f"train_rm.normalize={normalize}")
        for normalize in ("false", "true")
    )
    assert (with_it - without) / without == pytest.approx(64 / (64 + 24), rel=0.15), "64 of 96 are checked, 24 held out"


def test_the_precision_of_an_evaluation_is_printed(tmp_path: Path, capsys):
    loaded = load_recipe(ROOT / "recipes/quickstart.yaml", [])
    show_plan(plan_run(loaded, tmp_path / "run", Selection(), trial=False))
    assert "a win rate near 50% will be known to about +- 13 points" in " ".join(capsys.readouterr().out.split())


def test_what_is_wrong_with_the_data_is_said(small: Path, rlhf_here):
    code, said = rlhf_here("plan", small, "--no-trial", "--set", "train_rm.data=none.jsonl")
    assert code != 0
    assert "none.jsonl" in said


def test_advice_names_the_setting_and_how_much_it_saves():
    plain = {"model": {"path": "m", "precision": "float32"}, "sft": {"data": "d.jsonl", "adapter": "none"}}
    recipe = Recipe.model_validate(plain)
    stage, section = registry.stage("sft"), recipe.section("sft")
    extent = Extent(dataclasses.replace(SHAPE, weights=10_000_000))
    need = stage.memory(section, recipe, extent)
    assert need is not None
    accepted = accepted_by(recipe, {"sft"})
    found, combined = advise(stage, section, recipe, extent, limit=need.total * 3 // 4, accepts=accepted)
    assert not combined, "one is enough"
    advice = {one.change: one for one in found}
    assert advice["sft.adapter=lora"].fits
    assert not advice["sft.adapter=lora"].keeps_result
    assert advice["sft.gradient_checkpointing=true"].keeps_result
    for one in advice.values():
        assert one.saved == need.total - one.total > 0
    assert next(iter(advice.values())).fits, "what fits comes first"


def _tokens(stage_name: str, phase: str, recipe: Path, run: Path, *settings: str) -> float:
    found = plan_run(load_recipe(recipe, list(settings)), run, Selection(), trial=False)
    workload = next(stage.workload for stage in found.stages if stage.name == stage_name)
    assert workload is not None
    return sum(work.tokens for work in workload.work if work.phase == phase)


def test_evaluations_while_a_reward_model_is_trained_are_counted(small: Path):
    def evaluated(*settings: str) -> float:
        return _tokens("train-rm", "eval", small, small.parent / "run", *settings)

    plain, steps = evaluated(), 5
    every, second, once = (
        evaluated(f"train_rm.eval_steps={number}", "train_rm.keep_best=none") for number in (1, 2, steps)
    )
    held_out = once - plain
    assert held_out > 0
    assert every == plain + steps * held_out
    assert second == plain + 3 * held_out, "the last step is evaluated too"
    chosen = evaluated(f"train_rm.eval_steps={steps}")
    assert chosen == plain, "one half is evaluated while training, the other in the end"


def test_the_pass_before_each_step_and_the_normalization_of_rewards_are_counted(small: Path, tmp_path: Path):
    trained = _tokens("train-rm", "update", small, tmp_path / "run")
    plain = _tokens("train-rm", "eval", small, tmp_path / "run")
    assert _tokens("train-rm", "eval", small, tmp_path / "run", "train_rm.batch_sum_coef=0.1") == plain + trained
    assert _tokens("train-rm", "rollout", small, tmp_path / "run") == 0
    assert _tokens("train-rm", "rollout", small, tmp_path / "run", "train_rm.normalize=true") > 0

    # Completions that `label` samples are not drawn anew: 64 rankings are scored to check and 64 to normalize.
    quickstart = ROOT / "recipes/quickstart.yaml"
    with_it = _tokens("train-rm", "eval", quickstart, tmp_path / "run")
    without = _tokens("train-rm", "eval", quickstart, tmp_path / "run", "train_rm.normalize=false")
    held_out = without / (with_it - without) * 64 - 64
    assert held_out == pytest.approx(round(held_out))
    assert held_out > 0


def test_work_by_hand():
    drawn = drawing(SHAPE, "rollout", [10, 20], per_prompt=2, mean=5.0, longest=8, rows=3)
    pairs = 100 + 400 + 2 * (5 * 12.5 + 5 * 22.5)
    assert drawn.tokens == 20
    assert drawn.flops == SHAPE.forward_flops(30 + 20, scored=20, pairs=pairs)
    passed = scoring(SHAPE, "passes", [10, 20], per_prompt=2, mean=5.0, logits=True, times=3)
    assert passed.flops == 3 * SHAPE.forward_flops(50, scored=20, pairs=2 * (15**2 + 25**2))
    one = Work("rollout", "draw", 40.0, 0.0, calls=2, rows=1, each=4, longest=8)
    assert one.steps(5.0) == 2 * (5 * 3 + 5), "one row after another"
    assert Work("rollout", "draw", 0.0, 0.0, rows=64, each=64, longest=8).steps(5.0) == 8, (
        "the longest reaches the limit"
    )
    counted = count_passes(5, lambda step: [[0], [1, 2]], lambda part: (10 * len(part), len(part), 1))
    assert (counted.tokens, counted.scored, counted.pairs, counted.largest, counted.parts) == (150, 15, 10, 20, 10)
    assert spread(10, 2) == [2, 7]
    assert spread(2, 5) == [0, 1]


def test_seconds_by_hand():
    rates = Rates(load=2, train=3, forward=5, per_weight=0.5, per_byte=0.1, begin=1, step=0.25, row=0.125)
    work = (
        Work("update", "train", 0, 10),
        Work("rollout", "draw", 40, 0, calls=2, rows=4, each=4, longest=5, reading=7),
        Work("passes", "forward", 0, 4),
    )
    found = rates.seconds(Workload(1, "prompts", work, optimizer_steps=2, trained=6, loads=3, written=20))
    assert found["update"] == 3 * 10 + 2 * 6 * 0.5
    assert found["rollout"] == 2 * 1 + 7 * 5 + 10 * 0.25 + 40 * 0.125
    assert found["passes"] == 20
    assert found["other"] == 3 * 2 + 20 * 0.1
