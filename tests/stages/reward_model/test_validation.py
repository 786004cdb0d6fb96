"""Held-out loss while training, and the best weights kept: by hand, on resuming, and through the stage."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from rlhf_cli.data.records import Ranking, split_key
from rlhf_cli.data.splits import Split
from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.errors import DataError
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.stages.reward_model import run as train_rm
from rlhf_cli.stages.reward_model.best_weights import BestWeights
from rlhf_cli.stages.reward_model.data import encode_group, halves
from rlhf_cli.stages.reward_model.settings import RewardModelSettings
from rlhf_cli.stages.reward_model.trainer import RewardTrainer
from tests.stages.reward_model.test_stage import context_of, write_rankings
from tests.stages.reward_model.test_trainer import LORA, rankings, same, scorer_of, settings, weights
from tests.stops import NeverStop

DROPOUT = LoraSettings(rank=4, alpha=8.0, dropout=0.2)


def trainer_of(folder: Path, work: Path, *, lora=LORA, **changes) -> RewardTrainer:
    model = scorer_of(folder, lora)
    groups = [encode_group(model, ranking) for ranking in rankings(16)]
    work.mkdir(exist_ok=True, parents=True)
    given = settings(eval_steps=1, batch_size=4, epochs=2.0, **changes)
    return RewardTrainer(model, groups[:12], given, held_out=groups[12:], seed=5, work=work, stop=NeverStop())


def logged(work: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_the_held_out_loss_is_the_mean_over_groups_and_accuracy_is_over_pairs(tiny_llama, tmp_path):
    trainer = trainer_of(tiny_llama, tmp_path, micro_batch_size=3)
    losses, right = [], []
    for ranking in rankings(16)[12:]:
        rewards = trainer.model.score([ranking.prompt] * len(ranking.completions), ranking.completions)
        levels, own = ranking.levels(), []
        for i in range(len(levels)):
            for j in range(i + 1, len(levels)):
                gap = torch.tensor(rewards[i] - rewards[j]) * (1 if levels[i] <= levels[j] else -1)
                if levels[i] == levels[j]:
                    own.append(-(gap.sigmoid().log() + (-gap).sigmoid().log()) / 2)
                else:
                    own.append(-gap.sigmoid().log())
                    right.append(float(gap > 0))
        losses.append(sum(own) / len(own))
    found = trainer.evaluate()
    assert found["eval/loss"] == pytest.approx(float(sum(losses) / 4), abs=1e-5)
    assert found["eval/accuracy"] == pytest.approx(sum(right) / len(right))


def test_an_evaluation_has_no_dropout_no_gradient_and_no_regularization(tiny_llama, tmp_path):
    trainer = trainer_of(tiny_llama, tmp_path, lora=DROPOUT, center_coef=1.0, batch_sum_coef=1.0)
    trainer.model.train()
    state = torch.get_rng_state()
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first == second
    assert torch.equal(state, torch.get_rng_state())
    assert all(weight.grad is None for weight in trainer.trained.values())
    assert trainer.model.training
    assert first == trainer_of(tiny_llama, tmp_path / "plain", lora=DROPOUT).evaluate()


def test_it_is_logged_every_so_many_steps_and_after_the_last(tiny_llama, tmp_path):
    model = scorer_of(tiny_llama)
    groups = [encode_group(model, ranking) for ranking in rankings(12)]
    given = settings(eval_steps=2, batch_size=4, epochs=5 / 3)
    RewardTrainer(model, groups, given, held_out=groups, seed=5, work=tmp_path, stop=NeverStop()).train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/loss" in line] == [2, 4, 5]


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "full"])
@pytest.mark.parametrize("by", ["loss", "accuracy", "none"])
def test_the_best_weights_by_loss_or_accuracy_are_left_in_the_model(by, lora, tiny_llama, tmp_path):
    # A rate far too high: the loss goes up and down, and the last weights are not the best.
    trainer = trainer_of(tiny_llama, tmp_path, keep_best=by, lora=lora, learning_rate=0.5, schedule="constant")
    trainer.train()
    losses, accuracies = logged(tmp_path, "eval/loss"), logged(tmp_path, "eval/accuracy")
    assert losses[-1] > min(losses), "the test needs a run that got worse"
    expected = {"loss": losses.index(min(losses)), "accuracy": accuracies.index(max(accuracies)), "none": -1}[by]
    found = trainer.evaluate()
    assert found["eval/loss"] == pytest.approx(losses[expected], rel=1e-5)
    assert found["eval/accuracy"] == accuracies[expected]
    assert (trainer.best.found is None) == (by == "none")
    assert not (by == "none" and list(tmp_path.glob("best-*")))


@pytest.mark.parametrize("lora", [DROPOUT, None], ids=["adapter with dropout", "full"])
@pytest.mark.parametrize("killed_in", [2, 5])
def test_killed_after_keeping_the_best_and_resumed_equals_uninterrupted(killed_in, lora, tiny_llama, tmp_path):
    arguments = {"lora": lora, "learning_rate": 0.1, "schedule": "constant"}
    whole = trainer_of(tiny_llama, tmp_path / "whole", **arguments)
    whole.train()
    killed = trainer_of(tiny_llama, tmp_path / "killed", **arguments)
    offer = killed.best.offer

    def offer_and_die(step, *rest):
        offer(step, *rest)
        if step == killed_in:
            raise KeyboardInterrupt  # as kill -9 would, before the checkpoint of this step

    killed.best.offer = offer_and_die
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = trainer_of(tiny_llama, tmp_path / "killed", **arguments)
    resumed.train()
    assert same(weights(whole), weights(resumed))
    assert whole.best.found == resumed.best.found
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "killed/metrics.jsonl").read_bytes()


def test_evaluating_changes_no_training(tiny_llama, tmp_path):
    with_evaluation = trainer_of(tiny_llama, tmp_path / "a", lora=DROPOUT, keep_best="none")
    with_evaluation.train()
    without = trainer_of(tiny_llama, tmp_path / "b", lora=DROPOUT, keep_best="none")
    without.settings = without.settings.model_copy(update={"eval_steps": None})
    without.train()
    assert same(weights(with_evaluation), weights(without))


def test_a_best_that_cannot_be_read_is_an_error_and_not_the_last_weights(tiny_llama, tmp_path):
    trainer = trainer_of(tiny_llama, tmp_path)
    trainer.train()
    for file in tmp_path.glob("best-*/*"):
        file.write_bytes(b"damaged")
    again = trainer_of(tiny_llama, tmp_path)
    again.best.found = trainer.best.found
    with pytest.raises(DataError, match="cannot be read"):
        again.best.tensors()


def test_halves_divide_questions_and_keep_a_question_together():
    made = [Ranking(f"q{n // 2}", ("a", "b"), ((0,), (1,))) for n in range(14)]
    first, second = halves(made)
    assert len(first) + len(second) == 14
    assert not {split_key(one.prompt) for one in first} & {split_key(one.prompt) for one in second}
    assert abs(len(first) - len(second)) == 2


def test_the_stage_measures_on_the_half_that_did_not_choose(tiny_llama, tmp_path):
    data = write_rankings(tmp_path / "r.jsonl")
    (tmp_path / "all").mkdir()
    whole = train_rm.run(context_of(tmp_path / "all", tiny_llama, data, eval_steps=2, keep_best="none"))
    (tmp_path / "half").mkdir()
    context = context_of(tmp_path / "half", tiny_llama, data, eval_steps=2)
    chosen = train_rm.run(context)
    assert chosen.metrics["rm/prompts"] == whole.metrics["rm/prompts"] // 2
    assert chosen.metrics["rm/best_step"] % 2 == 0
    assert "rm/best_step" not in whole.metrics
    lines = [json.loads(line) for line in (context.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/accuracy" in line] == list(range(2, lines[-1]["step"] + 1, 2))


def test_one_held_out_prompt_cannot_both_choose_and_measure(tiny_llama, tmp_path):
    prompts = [f"Question {number}?" for number in range(40)]
    is_held_out = [Split(0.3, 0).holds_out(prompt) for prompt in prompts]
    kept = [prompt for prompt, held_out in zip(prompts, is_held_out, strict=True) if not held_out]
    rows = [
        {"prompt": prompt, "chosen": "a b", "rejected": "c"} for prompt in [*kept, prompts[is_held_out.index(True)]]
    ]
    data = tmp_path / "p.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="needs two held-out prompts"):
        train_rm.run(context_of(tmp_path, tiny_llama, data, eval_steps=1))


def test_keep_best_without_evaluations_has_no_effect_and_is_refused():
    with pytest.raises(ValidationError, match="no effect without `eval_steps`"):
        RewardModelSettings(keep_best="accuracy")


@pytest.mark.parametrize(("by", "kept"), [("accuracy", None), ("loss", 1)])
def test_an_accuracy_that_no_pair_says_does_not_choose(by, kept, tmp_path):
    best = BestWeights(by, tmp_path, ProcessGroup(torch.device("cpu")))
    best.offer(1, 0.5, math.nan, lambda: {"w": torch.zeros(1)})
    assert (None if best.found is None else best.found.step) == kept
