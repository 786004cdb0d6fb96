"""What can be told, in words."""

from __future__ import annotations

import pytest

from rlhf_cli.intervals import Measure, half_width, joint_level, share_interval
from rlhf_cli.statistics.wording import conclusion, expected_precision, prompts_for


def rate(won: float, prompts: int) -> Measure:
    value = won / prompts
    return Measure(value, *share_interval([value] * prompts, [1.0] * prompts), prompts)


def single(won: int, prompts: int) -> Measure:
    return Measure(won / prompts, *share_interval([1.0] * won + [0.0] * (prompts - won), [1.0] * prompts), prompts)


def test_before_the_run():
    assert expected_precision(60) == "about +- 12 points"
    assert expected_precision(400) == "about +- 5 points"


@pytest.mark.parametrize("reach", [0.2, 0.1, 0.03])
def test_the_number_of_prompts_for_a_precision(reach):
    needed = prompts_for(reach)
    assert half_width(needed) <= reach < half_width(needed - 1)
    assert needed == pytest.approx(0.25 * (1.96 / reach) ** 2, rel=0.1)


def test_after_the_run():
    assert conclusion(single(48, 60), "a/ppo", "a/sft").startswith(
        "a/ppo is better than a/sft: preferred on at least 68.6% of such prompts (60 prompts)"
    )
    assert conclusion(single(12, 60), "a/ppo", "a/sft").startswith(
        "a/sft is better than a/ppo: preferred on at least 68.6%"
    )
    said = conclusion(single(33, 60), "a/ppo", "a/sft")
    assert "60 prompts are too few to say which of a/ppo and a/sft is better: a win rate from 42.4% to 67.1% is" in said
    assert "if the true rate is 55.0%, about 390 prompts would show it" in said
    assert "200 prompts do not show which of a/ppo and a/sft is better" in conclusion(
        single(105, 200), "a/ppo", "a/sft"
    )
    assert conclusion(single(5, 10), "p", "b").endswith("is compatible with them"), "no number shows a half"
    assert conclusion(rate(0.5, 1), "p", "b").startswith("1 prompt is too few")


def test_several_pairs_have_wider_intervals_that_hold_together():
    won = [1.0] * 40 + [0.0] * 24  # 62.5 %, which 64 prompts show for one pair but not for three
    alone, joint = (share_interval(won, [1.0] * 64, joint_level(pairs)) for pairs in (1, 3))
    assert joint_level(1) == 0.95
    assert joint_level(5) == pytest.approx(0.99)
    assert alone[0] > 0.5 > joint[0]
    said = conclusion(Measure(0.625, *joint, 64), "p", "b", comparisons=3)
    assert said.startswith("64 prompts are too few to say")
    assert "if the true rate is 62.5%, about 89 prompts would show it" in said, "more than the 64 that do not"
    assert said.endswith("; 95% holds for all 3 pairs together")
