"""From scores to rankings, and what a set of rankings looks like."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.data.records import Message, Ranking
from rlhf_cli.errors import DataError
from rlhf_cli.labeling.scoring import FunctionScorer, RankingStatistics, score_completions, tiers_from_scores
from rlhf_cli.rewards.python_function import ScoringFunction


@pytest.mark.parametrize(
    ("scores", "margin", "tiers"),
    [
        pytest.param([0.1, 0.9, 0.5], 0.0, ((1,), (2,), (0,)), id="best first"),
        pytest.param([1.0, 2.0, 1.0, 2.0], 0.0, ((1, 3), (0, 2)), id="equal scores share a tier"),
        pytest.param([1.0, 1.5, 2.0], 0.5, ((1, 2), (0,)), id="a margin is inclusive, from the best of a tier"),
        pytest.param([0.0, 0.4, 0.8, 1.2], 0.5, ((2, 3), (0, 1)), id="a chain of small steps is not one tier"),
        pytest.param([3.0, 3.0, 3.0], 0.0, ((0, 1, 2),), id="all tied"),
    ],
)
def test_tiers(scores, margin, tiers):
    assert tiers_from_scores(scores, margin) == tiers


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9), st.floats(0, 3))
def test_tiers_hold_each_completion_once_and_never_contradict_the_scores(scores, margin):
    tiers = tiers_from_scores(scores, margin)
    assert sorted(index for tier in tiers for index in tier) == list(range(len(scores)))
    for better, worse in pairwise(tiers):
        assert min(scores[i] for i in better) > max(scores[i] for i in worse)
    for tier in tiers:
        assert max(scores[i] for i in tier) - min(scores[i] for i in tier) <= margin


class Wavering:
    """A scorer whose score of a text depends on its place, as a model's does in the last bit."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[object, str]]] = []

    def score(self, prompts, completions):
        self.asked.append(list(zip(prompts, completions, strict=True)))
        return [len(text) + 1e-7 * place for place, text in enumerate(completions)]

    def calls(self, own):
        return own


def test_equal_completions_to_a_prompt_get_equal_scores():
    scorer = Wavering()
    scores = score_completions(scorer, ["p", "q"], [["aa", "b", "aa"], ["aa", "aa", "c"]])
    assert scorer.asked == [[("p", "aa"), ("p", "b"), ("q", "aa"), ("q", "c")]]
    assert scores[0][0] == scores[0][2]
    assert tiers_from_scores(scores[1]) == ((0, 1), (2,))
    assert [len(group) for group in scores] == [3, 3]


def test_scoring_goes_in_batches_that_keep_a_prompt_together():
    scorer, done, asked = Wavering(), [], []
    prompts = [f"p{n}" for n in range(70)]
    completions = [[f"{n}a", f"{n}bb"] for n in range(70)]
    scores = score_completions(scorer, prompts, completions, stop=lambda: asked.append(1), progress=done.append)
    assert [len(call) for call in scorer.asked] == [128, 12]
    assert (sum(done), len(asked)) == (140, 2)
    assert [[round(x) for x in group] for group in scores] == [[len(a), len(b)] for a, b in completions]


def test_a_function_sees_conversations_as_text():
    seen = []
    plain = ScoringFunction("f", Path(), "", lambda prompts, completions: seen.append(prompts) or [0.0] * len(prompts))
    scorer = FunctionScorer(plain)
    talk = (Message("system", "be kind"), Message("user", "hi"))
    scorer.score(["plain", talk, (Message("user", "one"),)], ["a", "b", "c"])
    assert seen == [["plain", "system: be kind\n\nuser: hi", "one"]]


def test_a_function_that_labels_may_not_return_nan():
    scorer = FunctionScorer(ScoringFunction("rate.py:f", Path(), "", lambda prompts, completions: [1.0, math.nan]))
    with pytest.raises(DataError, match=r"`rate\.py:f` returned nan, .* the prompt 'q' and the completion 'b'"):
        scorer.score(["p", "q"], ["a", "b"])


def test_statistics_by_hand():
    rankings = [
        Ranking("p", ("a", "bbb", "cc"), ((1,), (0, 2))),  # pairs: bbb > a, bbb > cc; a = cc
        Ranking("q", ("dddd", "e"), ((1,), (0,))),  # e > dddd
    ]
    statistics = RankingStatistics.of(rankings)
    assert statistics == RankingStatistics(
        prompts=2, completions=5, mean_tiers=2.0, tie_share=1 / 4, mean_characters=11 / 5, longest_wins=2 / 3
    )
    assert RankingStatistics.of([Ranking("p", ("aa", "bb"), ((0,), (1,)))]).longest_wins is None
