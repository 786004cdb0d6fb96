"""PPO's invariants on tiny models: ratio 1, KL 0, batch splitting, optimizer steps, what moves, and that it learns."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from rlhf_cli.models.loading import ModelSource, load_policy, load_tokenizer
from rlhf_cli.stages.ppo.forward_passes import ForwardPasses
from rlhf_cli.stages.ppo.ptx import Demonstrations
from rlhf_cli.stages.ppo.update import Experience, Minibatch, UpdateStatistics
from rlhf_cli.training.timing import StepWatch


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.models.state().items()}


def completions_of(trainer, step=0):
    rows = trainer.rollouts.rows_of(step, len(trainer.data.prompts))
    numbers = range(step * len(rows), (step + 1) * len(rows))
    return trainer.rollouts.completions(trainer.data.prompts, rows, numbers, StepWatch())


@pytest.mark.parametrize("kind", ["shared", "separate"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2", "tiny_t5"])
def test_first_step_starts_at_kl_0_and_ratio_1(model, kind, request, tmp_path, make_trainer):
    trainer = make_trainer(request.getfixturevalue(model), tmp_path / "w", kind=kind, micro_batch_size=3)
    metrics = trainer.step(0).metrics
    assert metrics["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["val/first_epoch_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["val/first_epoch_approxkl"] < 1e-10
    # The second epoch comes after an optimizer step, so it has moved: otherwise nothing was trained.
    assert abs(metrics["val/ratio"] - 1.0) > 1e-6 or metrics["policy/approxkl_avg"] > 1e-8


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_the_reference_stays_the_sft_model(kind, tiny_llama, tmp_path, make_trainer):
    trainer = make_trainer(tiny_llama, tmp_path / "w", kind=kind)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    untouched = load_policy(ModelSource(str(tiny_llama)))(input_ids=ids).logits
    trainer.step(0)
    with trainer.models.reference() as reference:
        torch.testing.assert_close(reference(input_ids=ids).logits, untouched)
    with trainer.models.policy() as policy:
        assert (policy(input_ids=ids).logits - untouched).abs().max() > 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param({"kl_in": "loss", "kl_estimator": "k3", "entropy_coef": 0.1}, id="KL and entropy in the loss"),
    ],
)
@pytest.mark.parametrize("kind", ["shared", "separate", "shared head"])
def test_cutting_the_batch_differently_changes_nothing(kind, changes, tiny_llama, tmp_path, make_trainer):
    """8x1, 4x2, 3+3+2 and 1x8 give one and the same gradient."""
    results = []
    for number, size in enumerate((8, 4, 3, 1)):
        trainer = make_trainer(tiny_llama, tmp_path / str(number), kind=kind, micro_batch_size=size, **changes)
        completions = completions_of(trainer)
        before = trainer.forward_passes.rollout_tensors(completions)
        torch.manual_seed(1)
        advantages, returns = torch.randn(2, *before.values.shape)
        minibatch = Minibatch(list(range(8)), Experience(completions, before, advantages, returns), kl_coef=0.3)
        trainer.updater.accumulate(minibatch, UpdateStatistics())
        trained = [*trainer.models.policy_parameters(), *trainer.models.critic_parameters()]
        results.append([one.grad.clone() for one in trained if one.grad is not None])
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("failing", ["policy", "critic", "rollout"])
def test_a_pass_without_memory_changes_no_gradient_and_counts_nothing_twice(
    failing, tiny_llama, tmp_path, make_trainer, monkeypatch, capsys
):
    """A critic's pass fails behind the policy's backward pass, whose gradient must not count twice."""
    results = []
    for is_short in (False, True):
        trainer = make_trainer(tiny_llama, tmp_path / str(is_short))
        torch.nn.init.normal_(trainer.models.value_head.weight, generator=torch.Generator().manual_seed(0))
        passes = trainer.forward_passes
        name = "values" if failing == "critic" else "logprobs"
        plain = getattr(passes, name)

        def limited(model, batch, plain=plain, is_short=is_short, **named):
            is_update = torch.is_grad_enabled()
            if is_short and is_update != (failing == "rollout") and len(batch.completion_ids) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return plain(model, batch, **named)

        monkeypatch.setattr(passes, name, limited)
        completions = completions_of(trainer)
        before = passes.rollout_tensors(completions)
        torch.manual_seed(1)
        advantages, returns = torch.randn(2, *before.values.shape)
        minibatch = Minibatch(list(range(8)), Experience(completions, before, advantages, returns))
        statistics = UpdateStatistics()
        trainer.updater.accumulate(minibatch, statistics)
        trained = [*trainer.models.policy_parameters(), *trainer.models.critic_parameters()]
        results.append((before.values, statistics.sums, [one.grad for one in trained if one.grad is not None]))
    (values, sums, gradients), (short_values, short_sums, short_gradients) = results
    torch.testing.assert_close(short_values, values, atol=1e-5, rtol=1e-5)
    assert short_sums == pytest.approx(sums, abs=1e-4)
    for mine, theirs in zip(short_gradients, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
    said = " ".join(capsys.readouterr().err.split())
    assert "ran out of memory" in said
    assert "`ppo.micro_batch_tokens:" in said


def test_a_demonstration_pass_without_memory_keeps_the_gradient_of_ppo(tiny_llama, tmp_path, make_trainer, monkeypatch):
    demonstrations = Demonstrations.of([([5, 6, 7], [8, 9, 0]), ([3], [10, 11, 0]), ([12], [13, 0]), ([4], [9, 8, 7])])
    results = []
    for is_short in (False, True):
        trainer = make_trainer(
            tiny_llama, tmp_path / str(is_short), demonstrations=demonstrations, ptx={"coef": 1.0, "batch_size": 4}
        )
        plain = trainer.forward_passes.logprobs

        def limited(model, batch, *, temperature=None, plain=plain, is_short=is_short):
            if is_short and temperature == 1.0 and len(batch.completion_ids) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return plain(model, batch, temperature=temperature)

        monkeypatch.setattr(trainer.forward_passes, "logprobs", limited)
        seen = []
        monkeypatch.setattr(
            trainer.updater.optimizer,
            "step",
            lambda seen=seen, trainer=trainer: seen.extend(
                one.grad.clone() for one in trainer.models.policy_parameters() if one.grad is not None
            ),
        )
        trainer.step(0)
        results.append(seen)
    assert len(results[0]) == len(results[1]) > 0
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_a_token_budget_changes_no_gradient(tiny_llama, tmp_path, make_trainer):
    trainer = make_trainer(tiny_llama, tmp_path / "w")
    completions = completions_of(trainer)
    by_rows = trainer.forward_passes.rollout_tensors(completions)
    lengths = [len(a) + len(b) for a, b in zip(completions.prompt_ids, completions.completion_ids, strict=True)]
    budget = 2 * max(lengths)
    passes = ForwardPasses(
        trainer.models, autocast=nullcontext, micro_batch_size=1, micro_batch_tokens=budget, temperature=1.0
    )
    parts = list(passes.micro_batches(completions, range(8)))
    assert all(sum(lengths[row] for row in part) <= budget for part in parts)
    assert 1 < len(parts) < 8
    again = passes.rollout_tensors(completions)
    for name in ("logprobs", "reference_logprobs", "values", "entropy"):
        torch.testing.assert_close(getattr(again, name), getattr(by_rows, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("minibatches", "epochs"), [(1, 2), (2, 2), (4, 2), (4, 1)])
def test_optimizer_steps_are_epochs_times_minibatches(
    minibatches, epochs, tiny_llama, tmp_path, monkeypatch, make_trainer
):
    trainer = make_trainer(tiny_llama, tmp_path / "w", minibatches=minibatches, epochs=epochs)
    taken = []
    plain = trainer.updater.optimizer.step
    monkeypatch.setattr(trainer.updater.optimizer, "step", lambda: (taken.append(1), plain())[1])
    trainer.step(0)
    assert len(taken) == minibatches * epochs


def test_policy_and_critic_both_learn_and_nothing_else(tiny_llama, tmp_path, make_trainer):
    trainer = make_trainer(tiny_llama, tmp_path / "w", epochs=1)
    before = weights(trainer)
    frozen = {n: p.clone() for n, p in trainer.models.model.named_parameters() if not p.requires_grad}
    trainer.step(0)
    after = trainer.models.state()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    # A value head of zeros passes no gradient back in the very first step.
    assert moved == {"policy", "value_head"}
    for name, parameter in trainer.models.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    trainer.step(1)
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("critic."))


@pytest.mark.parametrize("kind", ["shared head", "separate head"])
def test_a_head_learns_alone_in_warm_up_and_then_with_the_policy(kind, tiny_llama, tmp_path, make_trainer):
    trainer = make_trainer(tiny_llama, tmp_path / "w", kind=kind, critic_warmup_steps=1, epochs=1)
    for expected in ({"value_head"}, {"policy", "value_head"}):
        before = weights(trainer)
        metrics = trainer.step(len(expected) - 1).metrics
        after = trainer.models.state()
        assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == expected
    assert metrics["val/first_epoch_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["loss/value_avg"] > 0.0


def test_values_are_predicted_before_their_token(tiny_llama, tmp_path, make_trainer):
    """Changing a token changes no value up to and including its own: V_t has not seen token t."""
    trainer = make_trainer(tiny_llama, tmp_path / "w")
    torch.nn.init.normal_(trainer.models.value_head.weight)
    completions = completions_of(trainer)
    row = max(range(8), key=lambda index: len(completions.completion_ids[index]))
    before = trainer.forward_passes.rollout_tensors(completions).values[row].clone()
    ids = [list(one) for one in completions.completion_ids]
    ids[row][3] = 17 if ids[row][3] != 17 else 18
    after = trainer.forward_passes.rollout_tensors(replace(completions, completion_ids=ids)).values[row]
    assert torch.equal(before[:4], after[:4])
    assert not torch.allclose(before[4], after[4])


def test_old_logprobs_are_constants(tiny_llama, tmp_path, make_trainer):
    trainer = make_trainer(tiny_llama, tmp_path / "w")
    before = trainer.forward_passes.rollout_tensors(completions_of(trainer))
    for tensor in (before.logprobs, before.reference_logprobs, before.values):
        assert not tensor.requires_grad


def test_it_learns_a_reward_it_can_see(tiny_llama, tmp_path, make_trainer, rows_of):
    trainer = make_trainer(
        tiny_llama, tmp_path / "w", kind="separate", steps=16, prompts_per_step=32, epochs=4, kl_coef=0.0,
        micro_batch_size=32, rollout_batch_size=32,
    )  # fmt: skip
    trainer.train()
    rows = rows_of(tmp_path / "w")
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"] + 0.2
    assert rows[-1]["objective/kl"] > 0.5


def test_every_prompt_is_used_once_per_epoch(tiny_llama, tmp_path, make_trainer):
    trainer = make_trainer(tiny_llama, tmp_path / "w", prompts_per_step=3, samples_per_prompt=2)
    seen = [row for step in range(8) for row in trainer.rollouts.rows_of(step, 8)]
    assert len(seen) == 8 * 3 * 2
    for epoch in range(3):
        assert sorted(seen[16 * epoch : 16 * epoch + 16]) == sorted(2 * list(range(8)))
    assert seen[:16] != seen[16:32]


def test_answers_of_one_prompt_differ(tiny_llama, tmp_path, make_trainer):
    trainer = make_trainer(tiny_llama, tmp_path / "w", prompts_per_step=2, samples_per_prompt=4)
    completions = completions_of(trainer)
    assert len({tuple(ids) for ids in completions.completion_ids[:4]}) > 1


def test_metrics_are_those_of_real_tokens(tiny_llama, tmp_path, make_trainer):
    """Means over padding would deflate all of them: they are those of each answer alone, averaged."""

    # So that completions end, some sooner than others.
    stop_tokens = load_tokenizer(ModelSource(str(tiny_llama))).convert_ids_to_tokens(list(range(60)))

    def trained():
        trainer = make_trainer(tiny_llama, tmp_path / "w", stop_tokens=stop_tokens, kl_in="loss", kl_estimator="k2")
        trainer.step(0)
        return trainer

    report = trained().step(1).metrics
    trainer = trained()
    completions = completions_of(trainer, 1)
    before = trainer.forward_passes.rollout_tensors(completions)
    lengths = [len(ids) for ids in completions.completion_ids]
    assert len(set(lengths)) > 1
    kl = [(before.logprobs - before.reference_logprobs)[row, :length].sum() for row, length in enumerate(lengths)]
    entropy = [before.entropy[row, :length].sum() for row, length in enumerate(lengths)]
    assert report["objective/kl"] == pytest.approx(float(sum(kl)) / 8, abs=1e-6)  # k1, though the loss has k2
    assert report["objective/non_score_reward"] == pytest.approx(-0.05 * report["objective/kl"])
    assert report["objective/entropy"] == pytest.approx(float(sum(entropy)) / 8, rel=1e-5)
    assert report["objective/entropy"] > 0
    assert report["length/mean"] == sum(lengths) / 8
