"""PPO's invariants on tiny models: ratio 1, KL 0, batch splitting, optimiser steps, resuming, and that it learns."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch

from rlhf_cli.errors import DivergedError, Interrupted
from rlhf_cli.models.adapters import adapter_state
from rlhf_cli.models.loading import ModelSource, load_policy, load_tokenizer
from rlhf_cli.models.roles import SeparateModels, SharedBackbone
from rlhf_cli.rollout.experience import Engine
from rlhf_cli.training.ppo import PPOTrainer, PromptSet
from rlhf_cli.training.ppo_options import PPOOptions

OPTIONS = PPOOptions(
    steps=3,
    prompts_per_step=8,
    samples_per_prompt=1,
    epochs=2,
    minibatches=1,
    micro_batch_size=8,
    rollout_batch_size=8,
    temperature=1.0,
    max_new_tokens=8,
    learning_rate=1e-2,
    critic_learning_rate=None,
    schedule="constant",
    max_grad_norm=1.0,
    clip_range=0.2,
    value_clip_range=0.2,
    value_coef=0.1,
    gamma=1.0,
    gae_lambda=0.95,
    whiten_advantages=True,
    whiten_rewards=False,
    kl_coef=0.05,
    kl_target=None,
    kl_horizon=100,
    kl_estimator="k1",
    missing_eos_reward=None,
    reward_clip=None,
    checkpoint_steps=1,
)
TEXTS = [
    "The cat sat",
    "Why is the sky blue?",
    "A short answer",
    "Please tell me how",
    "First heat",
    "Bread",
    "x",
    "so",
]


class StopAfter:
    """Asks to stop once `steps` were done; None never does."""

    def __init__(self, steps=None):
        self.left = steps

    @property
    def requested(self):
        return self.left is not None and self.left <= 1

    def check(self):
        if self.left is None:
            return
        self.left -= 1
        if self.left <= 0:
            raise Interrupted(15)


def vowels(prompts, texts, ended):
    """Share of vowels: something a policy of two layers can learn in a few steps."""
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in texts]


def make_roles(source, kind="shared"):
    torch.manual_seed(0)
    if kind == "shared":
        return SharedBackbone(load_policy(source), rank=4, alpha=8.0, target_modules="all-linear")
    full = [load_policy(source, dtype=torch.float32) for _ in range(3)]
    return SeparateModels(full[0], full[1], full[2])


def make_trainer(folder, work, *, kind="shared", reward=vowels, stop=None, seed=0, **changes):
    source = ModelSource(str(folder))
    tokenizer = load_tokenizer(source)
    roles = make_roles(source, kind)
    options = dataclasses.replace(OPTIONS, **changes)
    engine = Engine(
        roles, autocast=nullcontext, micro_batch_size=options.micro_batch_size, temperature=options.temperature
    )
    prompts = PromptSet(TEXTS, [tokenizer(text).input_ids for text in TEXTS], tokenizer, {tokenizer.eos_token_id})
    work.mkdir(exist_ok=True)
    return PPOTrainer(
        roles,
        engine,
        prompts,
        reward,
        options,
        seed=seed,
        work=work,
        metrics=work / "m.jsonl",
        stop=stop or StopAfter(),
    )


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.roles.state().items()}


@pytest.mark.parametrize("kind", ["shared", "separate"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2", "tiny_t5"])
def test_first_step_starts_at_kl_0_and_ratio_1(model, kind, request, tmp_path):
    trainer = make_trainer(request.getfixturevalue(model), tmp_path / "w", kind=kind, micro_batch_size=3)
    metrics = trainer.step(0)
    assert metrics["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["val/first_epoch_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["val/first_epoch_approxkl"] < 1e-10
    # The second epoch comes after an optimiser step, so it has moved: otherwise nothing was trained.
    assert abs(metrics["val/ratio"] - 1.0) > 1e-6 or metrics["policy/approxkl_avg"] > 1e-8


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_the_reference_stays_the_sft_model(kind, tiny_llama, tmp_path):
    trainer = make_trainer(tiny_llama, tmp_path / "w", kind=kind)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    untouched = load_policy(ModelSource(str(tiny_llama)))(input_ids=ids).logits
    trainer.step(0)
    with trainer.roles.reference() as reference:
        torch.testing.assert_close(reference(input_ids=ids).logits, untouched)
    with trainer.roles.policy() as policy:
        assert (policy(input_ids=ids).logits - untouched).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_cutting_the_batch_differently_changes_nothing(kind, tiny_llama, tmp_path):
    results = []
    for number, size in enumerate((8, 4, 3, 1)):
        trainer = make_trainer(tiny_llama, tmp_path / str(number), kind=kind, micro_batch_size=size, max_grad_norm=1e9)
        rows = trainer._prompts_of(0)
        answers = trainer._answer(rows, 0)
        before = trainer.engine.passes(answers)
        torch.manual_seed(1)
        advantages, returns = torch.randn(2, *before.values.shape)
        from rlhf_cli.training.ppo_update import UpdateStatistics

        trainer.updater._accumulate(list(range(8)), answers, before, advantages, returns, UpdateStatistics())
        results.append(
            [parameter.grad.clone() for parameter in trainer.updater.parameters if parameter.grad is not None]
        )
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("minibatches", "epochs"), [(1, 2), (2, 2), (4, 2), (4, 1)])
def test_optimiser_steps_are_epochs_times_minibatches(minibatches, epochs, tiny_llama, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_llama, tmp_path / "w", minibatches=minibatches, epochs=epochs)
    taken = []
    plain = trainer.updater.optimizer.step
    monkeypatch.setattr(trainer.updater.optimizer, "step", lambda: (taken.append(1), plain())[1])
    trainer.step(0)
    assert len(taken) == minibatches * epochs


def test_policy_and_critic_both_learn_and_nothing_else(tiny_llama, tmp_path):
    trainer = make_trainer(tiny_llama, tmp_path / "w", epochs=1)
    before = weights(trainer)
    frozen = {n: p.clone() for n, p in trainer.roles.model.named_parameters() if not p.requires_grad}
    trainer.step(0)
    after = trainer.roles.state()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"policy", "critic", "value_head"} - ({"critic"} if _head_was_zero(before) else set())
    for name, parameter in trainer.roles.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def _head_was_zero(state):
    # A value head of zeros passes no gradient back in the very first step.
    return state["value_head.weight"].abs().sum() == 0


def test_values_are_predicted_before_their_token(tiny_llama, tmp_path):
    """Changing a token changes no value up to and including its own: V_t has not seen token t."""
    trainer = make_trainer(tiny_llama, tmp_path / "w")
    torch.nn.init.normal_(trainer.roles.value_head.weight)
    answers = trainer._answer(trainer._prompts_of(0), 0)
    row = max(range(8), key=lambda index: len(answers.response_ids[index]))
    before = trainer.engine.passes(answers).values[row].clone()
    answers.response_ids[row][3] = 17 if answers.response_ids[row][3] != 17 else 18
    after = trainer.engine.passes(answers).values[row]
    assert torch.equal(before[:4], after[:4])
    assert not torch.allclose(before[4], after[4])


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_interrupted_and_resumed_ends_with_the_same_bytes(kind, tiny_llama, tmp_path):
    whole = make_trainer(tiny_llama, tmp_path / "whole", kind=kind, kl_target=1.0)
    whole.train()
    first = make_trainer(tiny_llama, tmp_path / "cut", kind=kind, kl_target=1.0, stop=StopAfter(2), checkpoint_steps=50)
    with pytest.raises(Interrupted):
        first.train()
    second = make_trainer(tiny_llama, tmp_path / "cut", kind=kind, kl_target=1.0)
    second.train()
    assert second.kl_coef == whole.kl_coef
    assert second.history == whole.history
    for name, tensor in whole.roles.state().items():
        assert torch.equal(tensor, second.roles.state()[name]), name
    assert (tmp_path / "whole/m.jsonl").read_bytes() == (tmp_path / "cut/m.jsonl").read_bytes()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tiny_llama, tmp_path, capsys):
    whole = make_trainer(tiny_llama, tmp_path / "whole")
    whole.train()
    cut = make_trainer(tiny_llama, tmp_path / "cut", stop=StopAfter(2))
    with pytest.raises(Interrupted):
        cut.train()
    newest = tmp_path / "cut/step-00000002/tensors.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-5] ^= 4
    newest.write_bytes(damaged)
    again = make_trainer(tiny_llama, tmp_path / "cut")
    again.train()
    assert "tensors.safetensors does not match its checksum" in " ".join(capsys.readouterr().err.split())
    for name, tensor in whole.roles.state().items():
        assert torch.equal(tensor, again.roles.state()[name]), name


def test_it_learns_a_reward_it_can_see(tiny_llama, tmp_path):
    trainer = make_trainer(
        tiny_llama, tmp_path / "w", kind="separate", steps=16, prompts_per_step=32, epochs=4, kl_coef=0.0,
        micro_batch_size=32, rollout_batch_size=32,
    )  # fmt: skip
    history = trainer.train()
    assert history[-1]["objective/scores"] > history[0]["objective/scores"] + 0.2
    assert history[-1]["objective/kl"] > 0.5


def test_a_stronger_leash_holds_the_policy_nearer(tiny_llama, tmp_path):
    ends = []
    for kl_coef in (0.0, 1.0):
        trainer = make_trainer(
            tiny_llama, tmp_path / str(kl_coef), kind="separate", steps=10, prompts_per_step=16, kl_coef=kl_coef,
            micro_batch_size=16, rollout_batch_size=16,
        )  # fmt: skip
        ends.append(trainer.train()[-1]["objective/kl"])
    assert ends[1] < 0.5 * ends[0]


def test_missing_eos_reward_replaces_and_reward_clip_cuts(tiny_llama, tmp_path):
    trainer = make_trainer(
        tiny_llama, tmp_path / "w", reward=lambda p, t, e: [9.0] * len(t), missing_eos_reward=-3.0, reward_clip=2.0
    )
    answers = trainer._answer(trainer._prompts_of(0), 0)
    answers.ended[:] = [True, False] * 4
    assert trainer._shaped(answers).tolist() == [2.0, -3.0] * 4
    assert answers.scores.tolist() == [9.0] * 8


def test_every_prompt_comes_once_a_lap(tiny_llama, tmp_path):
    trainer = make_trainer(tiny_llama, tmp_path / "w", prompts_per_step=3, samples_per_prompt=2)
    seen = [row for step in range(8) for row in trainer._prompts_of(step)]
    assert len(seen) == 8 * 3 * 2
    for lap in range(3):
        assert sorted(seen[16 * lap : 16 * lap + 16]) == sorted(2 * list(range(8)))
    assert seen[:16] != seen[16:32]


def test_answers_of_one_prompt_differ(tiny_llama, tmp_path):
    trainer = make_trainer(tiny_llama, tmp_path / "w", prompts_per_step=2, samples_per_prompt=4)
    answers = trainer._answer(trainer._prompts_of(0), 0)
    assert len({tuple(ids) for ids in answers.response_ids[:4]}) > 1


def test_nan_gradients_are_skipped_then_rolled_back_then_given_up(tiny_llama, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_llama, tmp_path / "w", steps=9, epochs=1)
    calls = {"count": 0}
    plain = torch.nn.utils.clip_grad_norm_

    def poisoned(parameters, limit):
        calls["count"] += 1
        return torch.tensor(float("nan")) if calls["count"] > 2 else plain(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    with pytest.raises(DivergedError, match="PPO diverged at step"):
        trainer.train()
    # Two good steps, three bad ones, back to the newest checkpoint, three bad ones again.
    assert calls["count"] == 8
    assert all(torch.isfinite(tensor).all() for tensor in trainer.roles.state().values())


def test_critic_of_a_saved_run_can_be_loaded_again(tiny_llama, tmp_path):
    from rlhf_cli.models.adapters import load_adapter
    from rlhf_cli.models.roles import load_value_head

    trainer = make_trainer(tiny_llama, tmp_path / "w")
    trainer.train()
    trainer.roles.save_critic(tmp_path / "critic")
    model = load_policy(ModelSource(str(tiny_llama)))
    load_adapter(model, tmp_path / "critic", "critic")
    for name, tensor in adapter_state(model, "critic").items():
        assert torch.equal(tensor, adapter_state(trainer.roles.model, "critic")[name])
    weight, bias = load_value_head(tmp_path / "critic")
    assert torch.equal(weight, trainer.roles.value_head.weight)
    assert torch.equal(bias, trainer.roles.value_head.bias)
