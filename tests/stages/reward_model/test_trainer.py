"""Training a reward model: exact normalization, resumption, faults, and that it learns."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from rlhf_cli.data.records import Ranking
from rlhf_cli.errors import DivergedError, Interrupted
from rlhf_cli.models.loading import ModelSource
from rlhf_cli.models.reward_model.loading import new_reward_model
from rlhf_cli.models.reward_model.model import RewardModel
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.stages.reward_model.data import Batches, RankedGroup, by_length, encode_group, padded_tokens
from rlhf_cli.stages.reward_model.settings import RewardModelSettings
from rlhf_cli.stages.reward_model.trainer import RewardTrainer
from tests.stops import NeverStop, StopAtStep

LORA = LoraSettings(rank=4, alpha=8.0)


def rankings(count: int = 12) -> list[Ranking]:
    """Answers with more water are better; sizes and tiers differ from prompt to prompt."""
    made = []
    for number in range(count):
        answers = tuple(f"{'water ' * amount}bread {number}" for amount in range(2 + number % 3))
        tiers = tuple((index,) for index in reversed(range(len(answers))))
        if number % 4 == 3:
            tiers = (*tiers[:-2], tiers[-2] + tiers[-1])
        made.append(Ranking(f"Question {number} about the river?", answers, tiers, margin=0.5))
    return made


def settings(**changes) -> RewardModelSettings:
    defaults = {
        "learning_rate": 1e-2,
        "batch_size": 8,
        "micro_batch_size": 4,
        "epochs": 3.0,
        "weight_decay": 0.01,
        "warmup_share": 0.2,
        "checkpoint_steps": 2,
    }
    return RewardModelSettings(**(defaults | changes))


def scorer_of(folder: Path, lora=LORA) -> RewardModel:
    return new_reward_model(ModelSource(str(folder)), template=None, lora=lora, seed=1)


def trainer_of(folder: Path, work: Path, *, stop=None, lora=LORA, groups=None, **changes) -> RewardTrainer:
    scorer = scorer_of(folder, lora)
    groups = [encode_group(scorer, ranking) for ranking in rankings()] if groups is None else groups
    work.mkdir(exist_ok=True, parents=True)
    return RewardTrainer(scorer, groups, settings(**changes), seed=5, work=work, stop=stop or NeverStop())


def weights(trainer: RewardTrainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.trained.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


REGULARIZED = {"center_coef": 0.3, "batch_sum_coef": 2.0}


@pytest.mark.parametrize("changes", [{}, {"loss": "plackett-luce"}, REGULARIZED], ids=str)
def test_micro_batches_change_no_gradient(changes, tiny_llama, tmp_path):
    gradients = []
    for size in (8, 4, 3, 1):
        trainer = trainer_of(tiny_llama, tmp_path / str(size), micro_batch_size=size, **changes)
        for name, weight in trainer.trained.items():
            if "lora_B" in name:
                torch.nn.init.constant_(weight, 0.01)
        sums = trainer.accumulate(range(8))
        assert sums.groups == 8
        gradients.append(torch.cat([weight.grad.flatten() for weight in trainer.trained.values()]))
    assert gradients[0].norm() > 1e-3
    for other in gradients[1:]:
        assert torch.allclose(gradients[0], other, atol=1e-6, rtol=1e-4)


def test_a_pass_without_memory_changes_no_gradient(tiny_llama, tmp_path, monkeypatch):
    from rlhf_cli.stages.reward_model import trainer as reward_trainer

    plain, results = reward_trainer.pairwise_ranking_loss, []
    for memory in (8, 3):
        trainer = trainer_of(tiny_llama, tmp_path / str(memory), micro_batch_size=8)

        def limited(*arguments, memory=memory):
            losses = plain(*arguments)
            if len(losses) > memory:
                (2.0 * losses.sum()).backward()
                raise MemoryError
            return losses

        monkeypatch.setattr(reward_trainer, "pairwise_ranking_loss", limited)
        sums = trainer.accumulate(range(8))
        results.append((sums, torch.cat([weight.grad.flatten() for weight in trainer.trained.values()])))
    (sums, gradient), (short_sums, short_gradient) = results
    assert short_sums.groups == 8
    assert short_sums.loss == pytest.approx(sums.loss, rel=1e-5)
    assert torch.allclose(gradient, short_gradient, atol=1e-6, rtol=1e-4)


def test_the_loss_of_a_step_is_the_mean_over_groups_of_the_mean_over_pairs(tiny_llama, tmp_path):
    trainer = trainer_of(tiny_llama, tmp_path, micro_batch_size=2)
    expected = []
    for ranking in rankings()[:8]:
        rewards = trainer.model.score([ranking.prompt] * len(ranking.completions), ranking.completions)
        levels, losses = ranking.levels(), []
        for i in range(len(levels)):
            for j in range(i + 1, len(levels)):
                gap = torch.tensor(rewards[i] - rewards[j])
                if levels[i] == levels[j]:
                    losses.append(-(gap.sigmoid().log() + (-gap).sigmoid().log()) / 2)
                else:
                    losses.append(-(gap if levels[i] < levels[j] else -gap).sigmoid().log())
        expected.append(sum(losses) / len(losses))
    sums = trainer.accumulate(range(8))
    assert sums.loss / sums.groups == pytest.approx(float(sum(expected) / 8), abs=1e-5)


def test_it_learns_what_the_labels_prefer(tiny_llama, tmp_path):
    trainer = trainer_of(tiny_llama, tmp_path, epochs=12.0)
    trainer.train()
    scores = trainer.model.score(["A new question?"] * 2, ["water water water bread", "bread"])
    assert scores[0] > scores[1] + 0.5
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2
    assert lines[-1]["accuracy"] > 0.9
    assert not trainer.model.training


def test_regularization_is_added_to_the_loss_and_its_gradient(tiny_llama, tmp_path):
    plain, regularized = (
        trainer_of(tiny_llama, tmp_path / name, **changes) for name, changes in (("a", {}), ("b", REGULARIZED))
    )
    groups = [encode_group(plain.model, ranking) for ranking in rankings()[:8]]
    sequences = [sequence for group in groups for sequence in group.sequences]
    rewards = plain.model(plain.model.batch(sequences))
    parts = rewards.split([len(group.sequences) for group in groups])
    squares = [torch.stack([(a + b) ** 2 for a, b in itertools.combinations(part, 2)]).mean() for part in parts]
    penalty = 0.3 * torch.stack(squares).mean() + 2.0 * rewards.mean() ** 2
    expected = torch.autograd.grad(penalty, list(plain.trained.values()))
    before = plain.accumulate(range(8))
    after = regularized.accumulate(range(8))
    assert after.loss / 8 == pytest.approx(before.loss / 8 + float(penalty.detach()), abs=1e-5)
    for name, gradient in zip(plain.trained, expected, strict=True):
        difference = regularized.trained[name].grad - plain.trained[name].grad
        assert torch.allclose(difference, gradient, atol=1e-5, rtol=1e-3)


def test_regularization_keeps_rewards_around_0(tiny_llama, tmp_path):
    means = []
    for name, changes in (("a", {}), ("b", {"center_coef": 0.5}), ("c", {"batch_sum_coef": 5.0})):
        trainer = trainer_of(tiny_llama, tmp_path / name, epochs=8.0, **changes)
        torch.nn.init.constant_(trainer.model.head.weight, 0.2)
        trainer.train()
        prompts = [ranking.prompt for ranking in rankings() for _ in ranking.completions]
        scores = trainer.model.score(prompts, [text for ranking in rankings() for text in ranking.completions])
        means.append(abs(sum(scores) / len(scores)))
    assert max(means[1:]) < means[0] / 2


@pytest.mark.parametrize("change", [{"loss": "plackett-luce"}, {"use_margin": True}, {"weight_decay": 0.5},
                                    {"max_grad_norm": 1e-3}, {"warmup_share": 0.9}, {"schedule": "constant"},
                                    {"epochs": 4.0}, {"batch_size": 4}, {"learning_rate": 2e-2},
                                    {"center_coef": 0.1}, {"batch_sum_coef": 0.1}])  # fmt: skip
def test_every_setting_has_an_effect(change, tiny_llama, tmp_path):
    plain, changed = trainer_of(tiny_llama, tmp_path / "a"), trainer_of(tiny_llama, tmp_path / "b", **change)
    plain.train()
    changed.train()
    assert not same(weights(plain), weights(changed))


@pytest.mark.parametrize(
    "lora", [LoraSettings(rank=4, alpha=8.0, dropout=0.2), None], ids=["adapter with dropout", "full"]
)
@pytest.mark.parametrize("killed_in", [1, 3, 4])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(killed_in, lora, tiny_llama, tmp_path):
    whole = trainer_of(tiny_llama, tmp_path / "whole", lora=lora)
    whole.train()
    killed = trainer_of(tiny_llama, tmp_path / "killed", lora=lora)
    real_step = killed.step

    def step(number: int, watch):
        if number == killed_in:
            raise KeyboardInterrupt  # as kill -9 would: nothing more is written
        return real_step(number, watch)

    killed.step = step
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = trainer_of(tiny_llama, tmp_path / "killed", lora=lora)
    resumed.train()
    assert same(weights(whole), weights(resumed))
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "killed/metrics.jsonl").read_text()


def test_a_signal_saves_the_step_that_was_running(tiny_llama, tmp_path):
    whole = trainer_of(tiny_llama, tmp_path / "whole", checkpoint_steps=100)
    whole.train()
    stopped = trainer_of(tiny_llama, tmp_path / "stopped", checkpoint_steps=100, stop=StopAtStep(3))
    with pytest.raises(Interrupted):
        stopped.train()
    assert (tmp_path / "stopped" / "step-00000003").is_dir()
    resumed = trainer_of(tiny_llama, tmp_path / "stopped", checkpoint_steps=100)
    resumed.train()
    assert same(weights(whole), weights(resumed))


def poison(trainer: RewardTrainer, steps: set[int], times: int | None = None) -> None:
    """Make the loss of these steps NaN: the first `times` times they run, or, for None, every time."""
    runs = Counter()
    real_accumulate = trainer.accumulate
    real_step = trainer.step
    current = []

    def step(number: int, watch):
        current[:] = [number]
        return real_step(number, watch)

    def accumulate(chosen, count):
        sums = real_accumulate(chosen, count)
        runs.update(current)
        if current[0] in steps and (times is None or runs[current[0]] <= times):
            sums.loss = float("nan")
            next(iter(trainer.trained.values())).grad.fill_(float("nan"))
        return sums

    trainer.step, trainer.accumulate = step, accumulate


def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny_llama, tmp_path):
    trainer = trainer_of(tiny_llama, tmp_path)
    poison(trainer, {1, 3, 4})
    state = trainer.train()
    assert state.skipped_steps == 3
    assert not state.rolled_back
    assert all(torch.isfinite(weight).all() for weight in trainer.trained.values())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["loss"] is None, "JSON has no NaN"


def test_three_in_a_row_go_back_once_and_then_give_up(tiny_llama, tmp_path, capsys):
    trainer = trainer_of(tiny_llama, tmp_path)
    poison(trainer, {2, 3, 4})
    with pytest.raises(DivergedError) as caught:
        trainer.train()
    assert caught.value.exit_code == 70
    assert trainer.loop.state.rolled_back
    assert capsys.readouterr().err.count("rolling back to step 2") == 1
    assert all(torch.isfinite(weight).all() for weight in trainer.trained.values())


def test_a_signal_among_bad_steps_does_not_change_where_a_run_rolls_back_to(tiny_llama, tmp_path, capsys):
    trainer = trainer_of(tiny_llama, tmp_path, checkpoint_steps=2, stop=StopAtStep(4))
    poison(trainer, {2, 3})
    with pytest.raises(Interrupted):
        trainer.train()
    assert sorted(path.name[-1] for path in tmp_path.glob("step-*")) == ["2", "4"], "the second is the signal's"
    again = trainer_of(tiny_llama, tmp_path, checkpoint_steps=2)
    poison(again, {4}, times=1)
    assert again.train().rolled_back
    said = capsys.readouterr().err
    assert "resuming from step 4 of 6" in said
    assert "skipped in steps 3 to 5" in said
    assert "rolling back to step 2" in said


def test_a_roll_back_halves_the_learning_rate(tiny_llama, tmp_path):
    trainer = trainer_of(tiny_llama, tmp_path, schedule="constant", warmup_share=0.0)
    poison(trainer, {2, 3, 4}, times=1)
    assert trainer.train().rolled_back
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert [line["learning_rate"] for line in lines[:2]] == [1e-2] * 2
    assert {line["learning_rate"] for line in lines[2:]} == {5e-3}


def test_every_group_is_seen_once_an_epoch_in_a_new_order():
    batches = Batches(10, 4, 2.0, seed=3)
    assert batches.steps == 6
    epochs = [[group for step in range(start, start + 3) for group in batches.groups(step)] for start in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    assert epochs[0] != [group for step in range(3) for group in Batches(10, 4, 2.0, seed=4).groups(step)]


def test_groups_of_like_length_come_together():
    from rlhf_cli.models.reward_model.batch import Encoded

    groups = [RankedGroup((Encoded([1] * size), Encoded([1])), (0, 1), 0.0) for size in (9, 2, 7, 1, 8)]
    assert by_length(groups, [0, 1, 2, 3, 4]) == [3, 1, 2, 4, 0]
    assert padded_tokens([groups[2], groups[0]]) == 4 * 9
