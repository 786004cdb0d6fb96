"""Figures of a comparison, by hand."""

from __future__ import annotations

import pytest

from rlhf_cli.data.records import Message
from rlhf_cli.generation.policy import Answer
from rlhf_cli.stages.evaluate.comparison import Comparison, comparison_metrics


def answer(text: str, tokens: int = 2, ended: bool = True) -> Answer:
    return Answer([1], [5] * tokens, text, ended)


def comparison(prompt="p", gold=(0.0, 1.0), reward=None, kl=1.0, sft="a b", ppo="c d", **tokens) -> Comparison:
    return Comparison(
        prompt, answer(sft, tokens.get("sft_tokens", 2)), answer(ppo, tokens.get("ppo_tokens", 2)), kl, gold, reward
    )


def figures(comparisons, tie_margin=0.0):
    return comparison_metrics(comparisons, tie_margin=tie_margin, resamples=500, seed=0)


def test_ties_count_a_half_within_the_margin():
    made = [
        comparison("p", (0.0, 1.0)),
        comparison("q", (1.0, 0.0)),
        comparison("r", (1.0, 1.2)),
        comparison("s", (0.0, 9.0)),
    ]
    assert figures(made)["win_rate"] == pytest.approx(3 / 4)
    found = figures(made, tie_margin=0.5)
    assert found["win_rate"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found["tie_rate"] == pytest.approx(1 / 4)
    assert comparison("p", (1.0, 1.0)).winner(0.0) == "tie"
    assert comparison("p", (1.0, 1.5)).winner(0.5) == "tie", "at most the margin"
    assert [one.winner(0.5) for one in made] == ["ppo", "sft", "tie", "ppo"]


def test_gold_decides_where_there_is_gold_and_reward_otherwise():
    assert comparison(gold=(0.0, 1.0), reward=(5.0, 1.0)).winner(0.0) == "ppo"
    assert comparison(gold=None, reward=(5.0, 1.0)).winner(0.0) == "sft"


def test_several_answers_to_one_prompt_are_one_prompt():
    made = [comparison("p", (0.0, 1.0)), comparison("p", (1.0, 0.0)), comparison("q", (0.0, 1.0))]
    found = figures(made)
    assert found["prompts"] == 2
    assert found["answers"] == 3
    assert found["win_rate"] == pytest.approx((0.5 + 1.0) / 2)


def test_the_interval_covers_the_rate_and_narrows_with_prompts():
    few = figures([comparison(str(n), (0.0, float(n % 4 > 0))) for n in range(8)])
    many = figures([comparison(str(n), (0.0, float(n % 4 > 0))) for n in range(200)])
    for found in (few, many):
        assert found["win_rate_low"] < found["win_rate"] < found["win_rate_high"]
    assert many["win_rate_high"] - many["win_rate_low"] < (few["win_rate_high"] - few["win_rate_low"]) / 2


def test_differences_are_paired_by_prompt():
    made = [comparison("p", reward=(1.0, 3.0)), comparison("q", reward=(10.0, 14.0))]
    found = figures(made)
    assert found["reward/sft_mean"] == 5.5
    assert found["reward/ppo_mean"] == 8.5
    assert found["reward/difference"] == 3.0
    assert found["reward/difference_se"] == pytest.approx(1.0), "the spread of 2 and 4, not that of 1 to 14"
    assert found["gold/sft_mean"] == 0.0
    assert found["gold/ppo_mean"] == 1.0


def test_kl_and_lengths():
    made = [comparison("p", kl=2.0, sft_tokens=4, ppo_tokens=6), comparison("q", kl=-1.0, sft_tokens=6, ppo_tokens=9)]
    found = figures(made)
    assert found["kl_nats"] == 0.5
    assert found["length/sft_mean"] == 5.0
    assert found["length/ppo_mean"] == 7.5
    assert found["length/ratio"] == 1.5


def test_without_a_common_tokenizer_there_is_no_kl():
    assert "kl_nats" not in figures([comparison(kl=None)])


def test_a_policy_that_collapsed_shows():
    made = [comparison(str(n), ppo="Thanks!", sft=f"answer {n}") for n in range(4)]
    found = figures(made)
    assert found["diversity/most_common_share"] == found["diversity/ppo_most_common_share"] == 1.0
    assert found["diversity/sft_most_common_share"] == 0.25


def test_a_line_of_samples():
    prompt = (Message("user", "hi"),)
    row = comparison(prompt, (0.5, 1.5), (2.0, 3.0)).to_json(0.0)
    assert row == {
        "prompt": [{"role": "user", "content": "hi"}],
        "sft": "a b",
        "ppo": "c d",
        "gold_sft": 0.5,
        "gold_ppo": 1.5,
        "reward_sft": 2.0,
        "reward_ppo": 3.0,
        "tokens_sft": 2,
        "tokens_ppo": 2,
        "ended_sft": True,
        "ended_ppo": True,
        "kl_nats": 1.0,
        "winner": "ppo",
    }
