"""What the phases of a PPO step do, by hand, and that a step times them."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from rlhf_cli.generation.prompts import TokenizedPrompts
from rlhf_cli.stages.ppo.forward_passes import Completions
from rlhf_cli.stages.ppo.settings import PPOSettings
from rlhf_cli.stages.ppo.update import UpdateStatistics
from rlhf_cli.stages.ppo.work import StepFlops, relative_durations, step_work
from rlhf_cli.training.flops import ModelSize
from rlhf_cli.training.timing import StepWatch

SIZES = StepFlops(
    policy=ModelSize(frozen=100, trained=10, layers=2, width=4),
    reference=ModelSize(frozen=100, trained=0, layers=2, width=4),
    critic=ModelSize(frozen=80, trained=5, layers=2, width=4),
)
COMPLETIONS = Completions(
    prompts=["a", "b"],
    prompt_ids=[[1, 2], [3]],
    completion_ids=[[4, 5, 6], [7]],
    texts=["", ""],
    finished=[True, True],
    scores=torch.zeros(2),
)
"""Five and two tokens, three and one of them sampled: 7 tokens, 25 + 4 = 29 squared."""


def test_the_work_of_each_phase():
    update = UpdateStatistics()
    update.sums["tokens"], update.sums["policy_tokens"] = 8, 6  # two epochs, of which the policy had one and a half
    work = step_work(COMPLETIONS, update, SIZES)
    assert {name: done.tokens for name, done in work.items()} == {"rollout": 4, "passes": 7, "update": 14}
    attention = 2 * 4 * 29  # L d T^2
    assert work["rollout"].flops == 2 * 110 * 7 + 4 * attention
    assert work["passes"].flops == 2 * (110 + 100 + 85) * 7 + 3 * 4 * attention
    policy, critic = (4 * 100 + 6 * 10) * 7 + 12 * attention, (4 * 80 + 6 * 5) * 7 + 12 * attention
    assert work["update"].flops == 1.5 * policy + 2 * critic


def test_operations_that_are_not_known_are_left_out():
    update = UpdateStatistics()
    update.sums["tokens"] = update.sums["policy_tokens"] = 4
    assert {done.flops for done in step_work(COMPLETIONS, update, None).values()} == {None}


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_the_sizes_of_the_models(kind, tiny_llama, tmp_path, make_trainer):
    models = make_trainer(tiny_llama, tmp_path / "w", kind=kind).models
    found = StepFlops.of(models)
    assert found is not None
    with models.reference() as model:
        everything = sum(weight.numel() for name, weight in model.named_parameters() if "lora_" not in name)
    vocabulary = 32 * found_vocabulary(models)
    policy = sum(weight.numel() for weight in models.policy_parameters())
    assert found.reference == ModelSize(everything, 0, 2, 32)
    if kind == "shared":
        critic = sum(weight.numel() for weight in models.critic_parameters())
        assert found.policy == ModelSize(everything, policy, 2, 32)
        assert found.critic == ModelSize(everything - vocabulary, critic, 2, 32)
    else:
        assert found.policy == ModelSize(0, everything, 2, 32)
        assert found.critic == ModelSize(0, everything - vocabulary + 33, 2, 32)  # with the value head


def found_vocabulary(models) -> int:
    with models.reference() as model:
        return model.get_input_embeddings().weight.shape[0]


def test_a_step_times_its_phases_and_shows_them(tiny_llama, tmp_path, make_trainer):
    trainer = make_trainer(tiny_llama, tmp_path / "w")
    shown: list[str] = []

    class Bar:
        def within(self, units, doing, *, amount, unit_left, **_) -> None:
            assert 0 <= units <= 1
            shown.append(f"{doing} {amount}{'' if unit_left is None else ' in step'}")

    watch = StepWatch(guess=trainer.phases)
    watch.show_on(Bar())  # pyright: ignore[reportArgumentType]
    watch.begin_step(3)
    report = trainer.step(0, watch)
    seconds = watch.end_step()
    assert set(seconds) == {"rollout", "scoring", "passes", "update", "step"}
    assert sum(seconds.values()) == pytest.approx(2 * seconds["step"], rel=0.2)
    drawn = report.work["rollout"].tokens
    assert drawn <= 8 * 8
    assert report.episodes == 8
    passed = report.work["passes"].tokens
    assert any(f"passes {3 * passed:,}/{3 * passed:,} tokens" in doing for doing in shown), "three models"
    assert any(f"updating {2 * passed:,}/{2 * passed:,} tokens" in doing for doing in shown), "two epochs"
    assert any("sampling" in doing and "tokens" in doing and "in step" in doing for doing in shown)


def test_a_run_writes_its_times(tiny_llama, tmp_path, make_trainer):
    trainer = make_trainer(tiny_llama, tmp_path / "w", eval_steps=2)
    trainer.train()
    before, *rows = [json.loads(line) for line in (tmp_path / "w/timing.jsonl").read_text().splitlines()]
    assert before["time/eval"] > 0
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert {f"time/{name}" for name in ("rollout", "scoring", "passes", "update", "checkpoint")} <= set(row)
        assert {"throughput/tokens_per_second", "throughput/generated_tokens_per_second"} <= set(row)
    assert "time/eval" in rows[1]


def test_a_critic_that_is_a_head_has_no_pass_of_its_own():
    """In the warm-up, here half an epoch, the policy goes forward for it."""
    head = replace(SIZES, critic_is_head=True)
    lengths = [5, 2]
    attention = 2 * 4 * 29
    assert head.passes(lengths) == 2 * (110 + 100) * 7 + 2 * 4 * attention
    trained = (4 * 100 + 6 * 10) * 7 + 12 * attention
    assert head.update(lengths, policy_epochs=1.5, critic_epochs=2.0) == 1.5 * trained + 0.5 * (
        2 * 85 * 7 + 4 * attention
    )


def test_the_guess_of_a_rollout_knows_how_long_prompts_are():
    policy = SimpleNamespace(sampling=SimpleNamespace(max_new_tokens=64))

    def guess(length: int) -> dict[str, float]:
        return relative_durations(PPOSettings(), cast("Any", policy), TokenizedPrompts(["p"], [[0] * length]))

    short, long = guess(10), guess(1000)
    assert short["rollout"] > 3 * long["rollout"] > 3, "prompts are passed over at once"
    assert short["update"] == long["update"] == 4 * short["passes"] * 2
