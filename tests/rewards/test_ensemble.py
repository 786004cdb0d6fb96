"""Several rewards become one: the arithmetic by hand, and what is said when one of them gives no number."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from rlhf_cli.data.records import Prompt
from rlhf_cli.rewards.base import NO_COLUMNS, Columns
from rlhf_cli.rewards.ensemble import CombinedReward, combined


class Fixed:
    """A reward that gives the numbers it was made with."""

    def __init__(self, name: str, *scores: float) -> None:
        self.name = name
        self._scores = list(scores)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Columns = NO_COLUMNS
    ) -> list[float]:
        assert len(prompts) == len(completions) > 0
        return self._scores[: len(completions)]


# Weighted: 1 * 1 = 1, 2 * 2 = 4, -1 * -7 = 7. Mean 4; deviations -3, 0, 3; population variance 18 / 3 = 6.
MEMBERS = [(Fixed("a", 1.0), 1.0), (Fixed("b", 2.0), 2.0), (Fixed("c", -7.0), -1.0)]


@pytest.mark.parametrize(
    ("combination", "std_coef", "expected"),
    [
        pytest.param("sum", 1.0, 12.0, id="1 + 4 + 7"),
        pytest.param("mean", 1.0, 4.0, id="12 / 3"),
        pytest.param("min", 1.0, 1.0, id="the least of the weighted"),
        pytest.param("mean-std", 1.0, 4.0 - math.sqrt(6.0), id="4 - sqrt(18 / 3)"),
        pytest.param("mean-std", 0.5, 4.0 - 0.5 * math.sqrt(6.0), id="half of the spread"),
        pytest.param("mean-std", 0.0, 4.0, id="no spread"),
    ],
)
def test_rewards_are_combined_as_by_hand(combination, std_coef, expected):
    scores = CombinedReward(MEMBERS, combination, std_coef=std_coef).score(["p"], ["c"])
    assert scores.total == [pytest.approx(expected, rel=1e-12)]
    assert scores.parts == {"a": [1.0], "b": [2.0], "c": [-7.0]}  # before their weights


@pytest.mark.parametrize("combination", ["sum", "mean", "min", "mean-std"])
def test_a_reward_with_weight_0_is_reported_and_changes_nothing(combination, capsys):
    gold = (Fixed("gold", -50.0, math.nan), 0.0)
    alone = CombinedReward(MEMBERS, combination).score(["p"], ["c"])
    beside = CombinedReward([*MEMBERS, gold], combination)
    assert beside.score(["p"], ["c"]).total == alone.total
    assert beside.score(["p"], ["c"]).parts["gold"] == [-50.0]
    assert beside.weights == {"a": 1.0, "b": 2.0, "c": -1.0, "gold": 0.0}
    assert beside.described().endswith("; gold is logged only")
    found = CombinedReward([(Fixed("a", 1.0, 2.0), 1.0), gold], combination).score(["p", "q"], ["c", "d"])
    assert found.total == [1.0, 2.0]  # no step is skipped because of a reward that is not trained on
    assert found.faults == []
    assert capsys.readouterr().err == ""


def test_each_answer_is_combined_on_its_own():
    members = [(Fixed("a", 1.0, 5.0, -2.0), 1.0), (Fixed("b", 3.0, 1.0, -2.0), 1.0)]
    assert CombinedReward(members, "min").score(["p"] * 3, ["x", "y", "z"]).total == [1.0, 1.0, -2.0]
    assert CombinedReward(members, "mean-std").score(["p"] * 3, ["x", "y", "z"]).total == [1.0, 1.0, -2.0]


def test_one_reward_is_itself_whatever_the_combination():
    for combination in ("sum", "mean", "min", "mean-std"):
        assert combined([2.5], combination, std_coef=3.0) == 2.5


@pytest.mark.parametrize("combination", ["sum", "mean", "min", "mean-std"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_nan_in_every_place_and_combination(combination, bad):
    assert math.isnan(combined([1.0, bad, 2.0], combination))
    assert math.isnan(combined([bad, 1.0], combination))


def test_nan_is_let_through_with_one_warning_that_names_reward_and_sample(capsys):
    members = [(Fixed("fine", 1.0, 1.0, 1.0), 1.0), (Fixed("bad.py:f", 2.0, math.nan, math.inf), 1.0)]
    scores = CombinedReward(members).score(["p", "why?", "r"], ["x", "because", "z"])
    assert scores.total[0] == 3.0
    assert [math.isnan(total) for total in scores.total] == [False, True, True]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("warning:") == 1
    assert "`bad.py:f` is not finite for 2 of 3 completions" in said
    assert "nan for the prompt 'why?' and the completion 'because'" in said
    assert "fine" not in said
    assert len(scores.faults) == 1
    assert scores.faults[0] in said


@pytest.mark.parametrize(
    ("scores", "weight", "is_finite"),
    [
        pytest.param((1.0, 1e39), 1.0, False, id="beyond float32"),
        pytest.param((1.0, -1e39), 1e-10, False, id="beyond float32, though not with its weight"),
        pytest.param((1.0, 1e38), 10.0, False, id="beyond float32 with its weight"),
        pytest.param((1.0, 3.4e38), 1.0, True, id="within float32"),
        pytest.param((1.0, 1e-50), 1.0, True, id="rounds to zero"),
    ],
)
def test_what_float32_cannot_hold_is_not_finite(scores, weight, is_finite, capsys):
    members = [(Fixed("fine", 1.0, 1.0), 1.0), (Fixed("large", *scores), weight)]
    found = CombinedReward(members).score(["p", "why?"], ["x", "because"])
    assert math.isfinite(found.total[0])
    assert math.isnan(found.total[1]) is not is_finite
    assert math.isfinite(torch.tensor(found.total[1])) is is_finite
    if is_finite:
        assert found.faults == []
    else:
        (fault,) = found.faults
        assert f"the reward `large` is not finite for 1 of 2 completions: {scores[1]}" in fault
        assert "float32" in fault
        assert "the prompt 'why?' and the completion 'because'" in fault


def test_a_sum_that_float32_cannot_hold_is_the_combinations_fault(capsys):
    members = [(Fixed("a", 3e38, math.nan), 1.0), (Fixed("b", 3e38, 1.0), 1.0)]
    found = CombinedReward(members).score(["p", "q"], ["x", "y"])
    assert [math.isnan(total) for total in found.total] == [True, True]
    alone, combination = found.faults
    assert "the reward `a` is not finite for 1 of 2 completions: nan for the prompt 'q'" in alone
    assert (
        "the combined reward is not finite for 1 of 2 completions: too large for float32 for the prompt 'p'"
        in combination
    )


@pytest.mark.parametrize("combination", ["sum", "mean", "min", "mean-std"])
def test_numbers_of_any_size_are_combined_without_an_exception(combination):
    assert math.isnan(combined([1e200, -1e200], combination))


def test_a_combination_is_described_for_people():
    first, second = Fixed("reward-model", 1.0), Fixed("gold.py:score", 2.0)
    assert CombinedReward([(first, 1.0)]).described() == "reward-model"
    both = [(first, 1.0), (second, 2.0)]
    assert CombinedReward(both, "min").described() == "the min of reward-model and 2 x gold.py:score"
    spread = CombinedReward(both, "mean-std", std_coef=0.5)
    assert spread.described() == "the mean - 0.5 std of reward-model and 2 x gold.py:score"


def test_names_are_made_unique_in_the_order_of_the_settings():
    members = [(Fixed(name, 1.0), 1.0) for name in ("a", "b", "a", "a", "a-2")]
    reward = CombinedReward(members)
    assert reward.names == ["a", "b", "a-2", "a-3", "a-2-2"]
    assert list(reward.score(["p"], ["c"]).parts) == reward.names


def test_a_process_without_a_share_asks_nobody():
    scores = CombinedReward(MEMBERS).score([], [])
    assert scores.total == []
    assert scores.parts == {"a": [], "b": [], "c": []}


def test_nothing_to_combine_is_a_mistake_of_ours():
    with pytest.raises(ValueError, match="at least one reward"):
        CombinedReward([])
    with pytest.raises(ValueError, match="other than 0"):
        CombinedReward([(Fixed("a", 1.0), 0.0)])
    with pytest.raises(ValueError, match="median"):
        CombinedReward(MEMBERS, "median")  # pyright: ignore[reportArgumentType]
