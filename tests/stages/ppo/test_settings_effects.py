"""Each setting of PPO has the effect its docstring says: a setting without effect is a bug (trap 3 of docs/ppo.md)."""

import importlib.util
import math

import pytest
import torch

from rlhf_cli.models.split_weights import vocabulary_weights
from rlhf_cli.stages.ppo.ptx import Demonstrations
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.training import adamw


def run(make_trainer, rows_of, model, folder, **changes):
    trainer = make_trainer(model, folder, **changes)
    trainer.train()
    return [row for row in rows_of(folder) if row["step"] > 0]


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.models.state().items()}


BASE = {"steps": 2}
DIFFERS = {
    "epochs": 3,
    "minibatches": 4,
    "temperature": 0.5,
    "max_new_tokens": 5,
    "samples_per_prompt": 2,
    "prompts_per_step": 5,
    "learning_rate": 3e-3,
    "critic_learning_rate": 1e-3,
    "warmup_share": 1.0,
    "max_grad_norm": 1e-3,
    "critic_warmup_steps": 1,
    "clip_range": 1e-4,
    "value_clip_range": 1e-4,
    "value_coef": 5.0,
    "entropy_coef": 1.0,
    "gamma": 0.5,
    "gae_lambda": 0.0,
    "whiten_advantages": False,
    "whiten_rewards": True,
    "update_kl_limit": 1e-9,
    "ratio_limit": 1.0000001,
    "kl_coef": 5.0,
    "kl_target": 0.001,
    "kl_estimator": "k3",
    "kl_in": "loss",
    "schedule": "linear",
    "reward_scale": 7.0,
    "reward_clip": 0.01,
    "missing_eos_reward": -3.0,
    "missing_eos_penalty": 2.0,
    "length_penalty": 0.5,
    "kl_horizon": 9.0,
}
ELSEWHERE = {
    "steps": "the length of the run",
    "micro_batch_size": "test_settings_of_effort_change_nothing_but_rounding",
    "micro_batch_tokens": "test_settings_of_effort_change_nothing_but_rounding",
    "rollout_batch_size": "test_settings_of_effort_change_nothing_but_rounding",
    "checkpoint_steps": "test_settings_of_effort_change_nothing_but_rounding",
    "keep_checkpoints": "test_the_last_checkpoints_are_kept_and_no_others",
    "kl_stop": "test_the_run_ends_when_it_is_too_far",
    "kl_budget": "test_the_best_policy_within_the_budget_is_what_is_left",
    "eval_steps": "test_held_out_prompts_are_evaluated_when_due",
    "eval_prompts": "test_held_out_prompts_are_evaluated_when_due",
    "show_steps": "test_fixed_prompts_are_shown_when_due",
    "shown_prompts": "test_fixed_prompts_are_shown_when_due",
    "overlap_rollouts": "test_rollouts_that_overlap_with_the_update_are_one_step_off_policy_and_corrected",
    "importance_cap": "test_the_importance_cap_bounds_the_weight_of_a_token",
    "optimizer": "test_moments_in_8_bits",
    "detectors": "test_a_passed_stop_saves_names_what_is_kept_and_a_higher_one_continues",
    "save_steps": "test_each_policy_is_that_of_a_shorter_run",
    "ptx": "test_ptx_is_the_mean_loss_of_a_completion_token",
}
"""Settings whose effect is not other weights, or that another test shows."""
OF_THE_STAGE = {
    "model", "reward_model", "rewards", "reward_combination", "reward_std_coef", "prompts", "stop_tokens", "adapter",
    "lora", "critic", "critic_from", "gradient_checkpointing", "offload_frozen",
}  # fmt: skip
"""Settings that choose what the trainer is given: see test_stage, test_data, test_rewards and test_model_loading;
`offload_frozen`: tests/gpu/test_memory.py."""
NEEDS = {
    # The first step has no KL, and a head of zeros no value: their settings show from the second update on.
    "reward_scale": {"whiten_advantages": False},
    "critic_learning_rate": {"whiten_advantages": False},
    "kl_target": {"steps": 3},
    "kl_estimator": {"kl_in": "loss", "kl_estimator": "k2"},
    "kl_horizon": {"kl_target": 0.001, "steps": 3},
    "ratio_limit": {"minibatches": 2},
}

TOGETHER = {"kl_in": {"kl_estimator": "k2"}}
"""Settings that a changed setting cannot do without."""


@pytest.fixture(scope="module")
def baselines():
    return {}


@pytest.mark.parametrize("setting", sorted(DIFFERS))
def test_every_setting_of_the_algorithm_changes_what_is_learned(setting, tiny_llama, tmp_path, make_trainer, baselines):
    """Same seed, one setting changed: other weights of policy or critic."""
    needs = NEEDS.get(setting, {})
    key = tuple(sorted(needs.items()))
    common = BASE | {"kind": "separate"} | needs
    if key not in baselines:
        trainer = make_trainer(tiny_llama, tmp_path / "base", **common)
        trainer.train()
        baselines[key] = weights(trainer)
    changes = {setting: DIFFERS[setting]} | TOGETHER.get(setting, {})
    changed = make_trainer(tiny_llama, tmp_path / "changed", **common | changes)
    changed.train()
    after = weights(changed)
    assert any(not torch.equal(after[name], tensor) for name, tensor in baselines[key].items()), setting


def test_every_option_is_looked_at():
    assert PPOSettings.model_fields.keys() == DIFFERS.keys() | ELSEWHERE.keys() | OF_THE_STAGE


def test_the_same_settings_give_the_same_weights(tiny_llama, tmp_path, make_trainer):
    """Without which the test above would show nothing."""
    ends = []
    for number in range(2):
        trainer = make_trainer(tiny_llama, tmp_path / str(number), **BASE, kind="separate")
        trainer.train()
        ends.append(weights(trainer))
    assert all(torch.equal(ends[1][name], tensor) for name, tensor in ends[0].items())


def test_settings_of_effort_change_nothing_but_rounding(tiny_llama, tmp_path, make_trainer):
    ends = []
    efforts = {}, {"micro_batch_size": 3, "rollout_batch_size": 2, "checkpoint_steps": 50}, {"micro_batch_tokens": 60}
    for number, effort in enumerate(efforts):
        trainer = make_trainer(tiny_llama, tmp_path / str(number), steps=2, **effort)
        trainer.train()
        ends.append(weights(trainer))
    for name, tensor in ends[0].items():
        for end in ends[1:]:
            torch.testing.assert_close(end[name], tensor, atol=2e-4, rtol=1e-3)


def test_a_larger_kl_penalty_keeps_the_policy_nearer(tiny_llama, tmp_path, make_trainer, rows_of):
    for place in ("reward", "loss"):
        ends = []
        for kl_coef in (0.0, 1.0):
            rows = run(
                make_trainer, rows_of, tiny_llama, tmp_path / f"{place}{kl_coef}", kind="separate", steps=16,
                prompts_per_step=16, kl_coef=kl_coef, micro_batch_size=16, rollout_batch_size=16, kl_in=place,
                kl_estimator="k1" if place == "reward" else "k2",
            )  # fmt: skip
            ends.append(rows[-1]["objective/kl"])
        assert ends[1] < 0.5 * ends[0], place


def test_kl_in_the_loss_leaves_the_rewards_alone(tiny_llama, tmp_path, make_trainer, rows_of, monkeypatch):
    from rlhf_cli.stages.ppo import trainer as ppo

    coefs = []
    plain = ppo.token_rewards
    monkeypatch.setattr(
        ppo, "token_rewards", lambda *a, kl_coef: (coefs.append(kl_coef), plain(*a, kl_coef=kl_coef))[1]
    )
    rows = run(make_trainer, rows_of, tiny_llama, tmp_path / "w", kl_in="loss", kl_estimator="k2", kl_coef=0.7)
    assert coefs == [0.0, 0.0, 0.0]
    assert rows[-1]["loss/kl_avg"] > 0


def test_the_entropy_bonus_keeps_the_entropy_up(tiny_llama, tmp_path, make_trainer, rows_of):
    ends = []
    for coef in (0.0, 3.0):
        rows = run(
            make_trainer, rows_of, tiny_llama, tmp_path / str(coef), kind="separate", steps=8, epochs=4, kl_coef=0.0,
            entropy_coef=coef,
        )  # fmt: skip
        ends.append(rows[-1]["policy/entropy_avg"])
    assert ends[1] > ends[0] + 0.05


def test_critic_warm_up_leaves_the_policy_alone(tiny_llama, tmp_path, make_trainer):
    trainer = make_trainer(tiny_llama, tmp_path / "w", critic_warmup_steps=2)
    before = weights(trainer)
    for step in range(3):
        metrics = trainer.step(step).metrics
        after = weights(trainer)
        moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert ("policy" in moved) == (step == 2)
        assert "value_head" in moved
        assert math.isnan(metrics["policy/approxkl_avg"]) == (step < 2)


def test_an_update_ends_once_it_is_too_far(tiny_llama, tmp_path, make_trainer, monkeypatch):
    taken = []
    trainer = make_trainer(tiny_llama, tmp_path / "w", epochs=8, kind="separate", update_kl_limit=0.01)
    plain = trainer.updater.optimizer.step
    monkeypatch.setattr(trainer.updater.optimizer, "step", lambda: (taken.append(1), plain())[1])
    metrics = trainer.step(0).metrics
    assert 1 <= len(taken) < 8
    assert metrics["policy/epochs"] == len(taken) + 1  # the last was looked at and not taken
    assert metrics["skipped_steps"] == 0


def test_a_minibatch_whose_ratio_ran_away_is_left_out_and_named(tiny_llama, tmp_path, make_trainer, capsys):
    trainer = make_trainer(tiny_llama, tmp_path / "w", kind="separate", learning_rate=0.3, epochs=3, ratio_limit=1.5)
    metrics = trainer.step(0).metrics
    assert metrics["skipped_steps"] >= 1
    assert metrics["val/largest_log_ratio"] > math.log(1.5)
    told = " ".join(capsys.readouterr().err.split())
    assert "because the mean probability ratio exceeded `ppo.ratio_limit: 1.5`" in told
    assert "step 1:" in told


@pytest.mark.parametrize("micro_batch_size", [8, 2])
def test_the_worst_ratio_is_that_of_its_answer_and_token(micro_batch_size, tiny_llama, tmp_path, make_trainer, capsys):
    """One token's old log-probability is moved: that token of that answer is named."""
    trainer = make_trainer(
        tiny_llama, tmp_path / "w", micro_batch_size=micro_batch_size, epochs=1, learning_rate=1e-9, ratio_limit=1.01
    )
    plain, seen = trainer.forward_passes.rollout_tensors, {}

    def passes(completions):
        before = plain(completions)
        before.logprobs[5, 3] -= 4.0
        seen["completions"] = completions
        return before

    trainer.forward_passes.rollout_tensors = passes
    metrics = trainer.step(0).metrics
    assert metrics["val/largest_log_ratio"] == pytest.approx(4.0, abs=1e-3)
    told = " ".join(capsys.readouterr().err.split())
    completions = seen["completions"]
    token = trainer.policy.format.tokenizer.decode([completions.completion_ids[5][3]])
    assert f'"{completions.prompts[5]}"' in told
    assert repr(token)[1:-1] in told or token.strip() in told


def test_beta_waits_for_the_policy(tiny_llama, tmp_path, make_trainer, rows_of):
    """In the critic's warm-up the KL is 0 whatever beta is, which says nothing about it."""
    rows = run(
        make_trainer, rows_of, tiny_llama, tmp_path / "w", kl_target=5.0, kl_horizon=16, critic_warmup_steps=1, steps=3
    )
    assert [row["objective/kl_coef"] for row in rows[:2]] == [0.05, 0.05]
    assert rows[2]["objective/kl_coef"] < 0.05


def test_the_policys_rate_begins_behind_the_critics_warm_up(tiny_llama, tmp_path, make_trainer):
    trainer = make_trainer(
        tiny_llama, tmp_path / "w", steps=6, epochs=1, schedule="linear", warmup_share=0.5, critic_warmup_steps=2
    )
    rates = [trainer.updater.learning_rate(step) for step in range(6)]
    assert rates == pytest.approx([0.0, 0.0, 0.5e-2, 1e-2, 1e-2, 0.5e-2])


def test_a_fixed_scale_reaches_the_evaluation(tiny_llama, tmp_path, make_trainer, rows_of, scores):
    """Clip and penalties are in the unit of the scaled reward, there as in training."""
    make_trainer(
        tiny_llama, tmp_path / "w", steps=1, eval_steps=1, reward=scores(lambda text: 400.0), reward_scale=0.01,
        reward_clip=5.0, length_penalty=0.25,
    ).train()  # fmt: skip
    rows = rows_of(tmp_path / "w")
    assert rows[0]["eval/objective/reward"] == pytest.approx(4.0 - 0.25 * rows[0]["eval/length/mean"])


def test_learning_rates_rise_over_the_warm_up_and_fall_after(tiny_llama, tmp_path, make_trainer):
    trainer = make_trainer(tiny_llama, tmp_path / "w", steps=10, epochs=1, schedule="linear", warmup_share=0.3)
    rates = [trainer.updater.learning_rate(step) for step in range(10)]
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 2e-3


def test_the_run_ends_when_it_is_too_far(tiny_llama, tmp_path, make_trainer, rows_of):
    changes = {"kind": "separate", "steps": 30, "epochs": 4, "kl_coef": 0.0, "kl_stop": 0.5}
    trainer = make_trainer(tiny_llama, tmp_path / "w", **changes)
    trainer.train()
    rows = rows_of(tmp_path / "w")
    assert len(rows) < 30
    assert all(row["objective/kl"] <= 0.5 for row in rows[:-1])
    assert rows[-1]["objective/kl"] > 0.5
    assert "kl_stop" in trainer.state.ended
    again = make_trainer(tiny_llama, tmp_path / "w", **changes)
    assert again.train().ended == trainer.state.ended
    assert len(rows_of(tmp_path / "w")) == len(rows)


def test_the_coefficient_adapts_to_its_target(tiny_llama, tmp_path, make_trainer, rows_of):
    rows = run(make_trainer, rows_of, tiny_llama, tmp_path / "w", kl_target=5.0, kl_horizon=16)
    # KL 0 in the first step is 100 % below its target, cut to 20 %, of 8 completions in a horizon of 16.
    assert rows[0]["objective/kl_coef"] == 0.05
    assert rows[1]["objective/kl_coef"] == pytest.approx(0.05 * (1 - 0.2 * 8 / 16))


def test_held_out_prompts_are_evaluated_when_due(tiny_llama, tmp_path, make_trainer, rows_of):
    make_trainer(tiny_llama, tmp_path / "w", steps=5, eval_steps=2, eval_prompts=3).train()
    evaluated = {row["step"]: row for row in rows_of(tmp_path / "w") if "eval/objective/scores" in row}
    assert list(evaluated) == [0, 2, 4, 5]
    assert evaluated[0]["eval/objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert evaluated[5]["eval/objective/kl"] != 0.0
    assert evaluated[0].keys() == {"step"} | {name for name in evaluated[0] if name.startswith("eval/")}


def test_evaluation_does_not_touch_what_is_trained(tiny_llama, tmp_path, make_trainer):
    plain, looked_at = (make_trainer(tiny_llama, tmp_path / str(n), eval_steps=n, show_steps=n) for n in (None, 1))
    plain.train()
    looked_at.train()
    assert all(torch.equal(looked_at.models.state()[name], one) for name, one in plain.models.state().items())


def test_fixed_prompts_are_shown_when_due(tiny_llama, tmp_path, make_trainer, capsys):
    import json

    make_trainer(tiny_llama, tmp_path / "w", steps=4, show_steps=2, shown_prompts=2).train()
    rows = [json.loads(line) for line in (tmp_path / "w/samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 0, 2, 2, 4, 4]
    assert {row["prompt"] for row in rows} == {"Who knows", "When is it"}
    assert "Who knows" in capsys.readouterr().err


def test_ptx_teaches_the_demonstrations(tiny_llama, tmp_path, make_trainer, rows_of):
    """Its loss falls where it is mixed in, and the policy moves differently from plain PPO."""
    demonstrations = Demonstrations.of([([5, 6, 7], [8, 9, 0]), ([], [10, 11, 0]), ([12], [13, 0])])
    rows = run(
        make_trainer, rows_of, tiny_llama, tmp_path / "w", kind="separate", steps=6, demonstrations=demonstrations,
        ptx={"coef": 1.0, "batch_size": 3},
    )  # fmt: skip
    assert rows[-1]["loss/ptx_avg"] < 0.6 * rows[0]["loss/ptx_avg"]


def test_ptx_is_the_mean_loss_of_a_completion_token(tiny_llama, tmp_path, make_trainer):
    """By hand: at temperature 1, whatever PPO samples at; over completion tokens; text without a prompt by its rest."""
    demonstrations = Demonstrations.of([([5, 6, 7], [8, 9, 0]), ([], [10, 11, 0])])
    trainer = make_trainer(
        tiny_llama, tmp_path / "w", kind="separate", temperature=0.5, demonstrations=demonstrations,
        ptx={"coef": 2.0, "batch_size": 2},
    )  # fmt: skip
    loss, tokens = trainer.updater.supervised.accumulate(0)
    found = [one.grad.clone() for one in trainer.models.policy_parameters() if one.grad is not None]
    with trainer.models.policy() as model:
        model.zero_grad(set_to_none=True)
        expected = 0.0
        for ids, completion in (([5, 6, 7, 8, 9, 0], 3), ([10, 11, 0], 2)):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -completion - 1 : -1].log_softmax(-1)
            expected = expected - logits.gather(1, torch.tensor(ids[-completion:]).unsqueeze(1)).sum()
        (2.0 * expected / 5).backward()
        by_hand = [one.grad for one in trainer.models.policy_parameters() if one.grad is not None]
    assert tokens == 5
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    for mine, theirs in zip(found, by_hand, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_moments_in_8_bits(tiny_llama, tmp_path, make_trainer, monkeypatch):
    """Of all weights but embeddings and the projection to the vocabulary, of policy and critic."""
    monkeypatch.setattr(adamw, "SMALLEST", 1)
    trainer = make_trainer(tiny_llama, tmp_path / "w", kind="separate", optimizer="adamw-8bit", steps=1)
    trainer.train()
    with trainer.models.policy() as policy, trainer.models.critic() as critic:
        precise = vocabulary_weights(policy) | vocabulary_weights(critic)
    moments = {weight: state["exp_avg"].dtype for weight, state in trainer.updater.optimizer.state.items()}
    assert len(precise & moments.keys()) == 2, "the tied embedding of each"
    assert {dtype for weight, dtype in moments.items() if weight in precise} == {torch.float32}
    assert {dtype for weight, dtype in moments.items() if weight not in precise} == {torch.uint8}


def test_the_running_scale_divides_by_the_spread_so_far(tiny_llama, tmp_path, make_trainer, scores):
    trainer = make_trainer(
        tiny_llama, tmp_path / "w", reward=scores(lambda text: 100.0 * len(text)), reward_scale="running"
    )
    seen = []
    for step in range(2):
        plain = trainer.rollouts.completions
        trainer.rollouts.completions = lambda *a, plain=plain: (seen.append(plain(*a)), seen[-1])[1]
        trainer.step(step)
    everything = (
        torch.cat([completions.scores for completions in seen[-1:]])
        if len(seen) == 1
        else torch.cat([completions.scores for completions in (seen[0], seen[-1])])
    )
    assert trainer.state.moments.count == 16
    assert trainer.state.moments.std == pytest.approx(float(everything.double().std(correction=0)), rel=1e-6)
    rewards = trainer.rewards(seen[-1])
    assert rewards.std(correction=0) < 5


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_the_critic_s_gradient_does_not_shrink_the_policy_s(tiny_llama, tmp_path, make_trainer, rows_of, kind):
    """Each model is clipped by its own norm: with a joint one, a large value loss would stop the policy."""
    ends, rows = [], []
    for value_coef in (0.1, 1e4):
        trainer = make_trainer(
            tiny_llama, tmp_path / str(value_coef), kind=kind, steps=1, value_coef=value_coef, max_grad_norm=0.01
        )
        trainer.train()
        ends.append([weight.detach().clone() for weight in trainer.models.policy_parameters()])
        rows.append(rows_of(tmp_path / str(value_coef))[0])
    torch.testing.assert_close(*ends)
    assert rows[0]["policy/grad_norm"] == pytest.approx(rows[1]["policy/grad_norm"])
    assert rows[1]["val/grad_norm"] > 1e3 * rows[0]["val/grad_norm"] > 0
