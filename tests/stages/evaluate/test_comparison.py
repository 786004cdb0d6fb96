"""Figures of a comparison, by hand."""

from __future__ import annotations

import pytest

from rlhf_cli.data.records import Message
from rlhf_cli.generation.generator import Completion
from rlhf_cli.stages.evaluate.comparison import Comparison, comparison_metrics


def completion(text: str, tokens: int) -> Completion:
    return Completion([5] * tokens, text, finished=True)


def comparison(
    prompt="p", gold=(0.0, 1.0), reward=None, kl=1.0, baseline="a b", policy="c d", baseline_tokens=2, policy_tokens=2
) -> Comparison:
    return Comparison(
        prompt, completion(baseline, baseline_tokens), completion(policy, policy_tokens), kl, gold, reward
    )


def figures(comparisons, tie_margin=0.0):
    return comparison_metrics(comparisons, tie_margin=tie_margin)


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
    assert [one.winner(0.5) for one in made] == ["policy", "baseline", "tie", "policy"]


def test_equal_texts_tie_however_their_rewards_were_rounded():
    same = comparison(gold=None, reward=(12.931753, 12.931754), baseline="}M", policy="}M")
    assert (same.winner(0.0), figures([same])["win_rate"]) == ("tie", 0.5)
    other = comparison(gold=None, reward=(12.931753, 12.931754), baseline="}M", policy="}N")
    assert other.winner(0.0) == "policy"


def test_gold_decides_where_there_is_gold_and_reward_otherwise():
    assert comparison(gold=(0.0, 1.0), reward=(5.0, 1.0)).winner(0.0) == "policy"
    assert comparison(gold=None, reward=(5.0, 1.0)).winner(0.0) == "baseline"


def test_several_completions_of_one_prompt_are_one_prompt():
    made = [comparison("p", (0.0, 1.0)), comparison("p", (1.0, 0.0)), comparison("q", (0.0, 1.0))]
    found = figures(made)
    assert found["prompts"] == 2
    assert found["completions"] == 3
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
    assert found["reward/baseline_mean"] == 5.5
    assert found["reward/policy_mean"] == 8.5
    assert found["reward/difference"] == 3.0
    assert found["reward/difference_se"] == pytest.approx(1.0), "the spread of 2 and 4, not that of 1 to 14"
    assert found["gold/baseline_mean"] == 0.0
    assert found["gold/policy_mean"] == 1.0


def test_kl_and_lengths():
    made = [
        comparison("p", kl=2.0, baseline_tokens=4, policy_tokens=6),
        comparison("q", kl=-1.0, baseline_tokens=6, policy_tokens=9),
    ]
    found = figures(made)
    assert found["kl_nats"] == 0.5
    assert found["length/baseline_mean"] == 5.0
    assert found["length/policy_mean"] == 7.5
    assert found["length/ratio"] == 1.5


def test_without_a_common_tokenizer_there_is_no_kl():
    assert "kl_nats" not in figures([comparison(kl=None)])


def test_a_policy_that_collapsed_shows():
    made = [comparison(str(n), policy="Thanks!", baseline=f"answer {n}") for n in range(4)]
    found = figures(made)
    assert found["diversity/most_common_share"] == found["diversity/policy_most_common_share"] == 1.0
    assert found["diversity/baseline_most_common_share"] == 0.25


def test_a_line_of_samples():
    prompt = (Message("user", "hi"),)
    row = comparison(prompt, (0.5, 1.5), (2.0, 3.0)).to_json(0.0)
    assert row == {
        "prompt": [{"role": "user", "content": "hi"}],
        "baseline": "a b",
        "policy": "c d",
        "gold_baseline": 0.5,
        "gold_policy": 1.5,
        "reward_baseline": 2.0,
        "reward_policy": 3.0,
        "tokens_baseline": 2,
        "tokens_policy": 2,
        "finished_baseline": True,
        "finished_policy": True,
        "kl_nats": 1.0,
        "winner": "policy",
    }
