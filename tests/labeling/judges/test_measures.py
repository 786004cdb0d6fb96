"""What is said about judges, counted by hand: agreement, consistency, preference for the first and for the longer."""

from __future__ import annotations

import pytest

from rlhf_cli.data.records import Candidates
from rlhf_cli.errors import DataError
from rlhf_cli.labeling.judges.calibration import Calibration
from rlhf_cli.labeling.judges.measures import (
    ReplyStatistics,
    VerdictStatistics,
    agreement,
    averaged,
    between,
    by_subset,
)
from rlhf_cli.labeling.judges.panel import Ballot, Judge, Vote
from rlhf_cli.labeling.judges.questions import Question
from rlhf_cli.labeling.judges.rates import Rate
from rlhf_cli.labeling.judges.replies import NO_VERDICT, TOO_LONG, Reply
from rlhf_cli.labeling.judges.verdicts import both_ways
from rlhf_cli.labeling.judges.warnings import warnings_of_judge, warnings_of_panel

JUDGE = Judge("one", "id", "mark")


def pair(number: int, *, longer_is_right: bool = True, subset: str | None = None) -> Candidates:
    """A prompt whose first answer is the better one."""
    return Candidates(
        f"prompt {number}", ("a long answer", "short")[:: 1 if longer_is_right else -1], ((0,), (1,)), subset
    )


def test_agreement_by_hand():
    candidates = [pair(0), pair(1), pair(2, longer_is_right=False), pair(3, longer_is_right=False), pair(4)]
    verdicts = [{(0, 1): 1}, {(0, 1): -1}, {(0, 1): 1}, {(0, 1): 0}, {}]
    found = agreement(candidates, verdicts)
    assert found is not None
    assert (found.rate.value, found.rate.count) == (pytest.approx((1 + 0 + 1 + 0.5 + 0.5) / 5), 5)
    assert (found.decided.value, found.decided.count) == (pytest.approx(2 / 3), 3)
    assert (found.longer.value, found.longer.count) == (pytest.approx(1.5 / 3), 3)
    assert (found.shorter.value, found.shorter.count) == (pytest.approx(1.5 / 2), 2)
    assert found.balanced == pytest.approx((0.5 + 0.75) / 2)
    assert found.missing == 1
    assert found.rate.low is not None
    assert found.rate.low < 0.6 < (found.rate.high or 0.0)


def test_which_answer_is_longer_is_asked_of_the_better_one_wherever_it_stands():
    turned = Candidates("p", ("short", "a long answer"), ((1,), (0,)))
    found = agreement([turned], [{(0, 1): -1}])
    assert found is not None
    assert (found.longer.value, found.shorter.value) == (1.0, None)


def test_ties_of_people_do_not_count_and_their_order_is_what_matters():
    """K = 3, known 1 > 0 = 2: two untied pairs; the tie between 0 and 2 is nobody's to miss."""
    row = Candidates("p", ("x", "yy", "zzz"), ((1,), (0, 2)))
    found = agreement([row], [{(0, 1): -1, (1, 2): -1, (0, 2): 1}])
    assert found is not None
    assert (found.rate.value, found.rate.count) == (0.5, 2)
    assert agreement([Candidates("p", ("x", "y"), ((0, 1),))], [{(0, 1): 1}]) is None
    assert agreement([Candidates("p", ("x", "y"))], [{(0, 1): 1}]) is None


def test_subsets_are_counted_apart():
    candidates = [pair(0, subset="easy"), pair(1, subset="hard"), pair(2, subset="hard"), pair(3)]
    found = by_subset(candidates, [{(0, 1): 1}, {(0, 1): -1}, {(0, 1): 1}, {(0, 1): 1}])
    assert {name: (one.rate.value, one.rate.count) for name, one in found.items()} == {
        "easy": (1.0, 1),
        "hard": (0.5, 2),
    }


def test_pairs_of_one_prompt_are_resampled_together():
    alone = Rate.of((f"prompt {number}", number % 2, 1) for number in range(100))
    together = Rate.of((f"prompt {number // 20}", (number // 20) % 2, 1) for number in range(100))
    assert (alone.value, together.value) == (0.5, 0.4)
    width = [(rate.high or 0.0) - (rate.low or 0.0) for rate in (alone, together)]
    assert width[1] > 2 * width[0]
    assert Rate.of([("p", 0, 0)]).value is None


def test_what_was_always_so_has_an_interval_too():
    """Clopper and Pearson's for n of n: from 0.025^(1/n); three pairs of one prompt are one observation."""
    always = Rate.of((f"prompt {number}", 1, 1) for number in range(10))
    assert (always.value, always.high) == (1.0, 1.0)
    assert always.low == pytest.approx(0.025 ** (1 / 10), abs=1e-6)
    once = Rate.of([("prompt", 3, 3), ("other", 0, 0)])
    assert once.low == pytest.approx(0.025, abs=1e-6)


def test_behavior_by_hand():
    candidates = [pair(0), pair(1), pair(2), Candidates("p", ("same size", "size same")), Candidates("q", ("x", "x"))]
    verdicts = [{(0, 1): 1}, {(0, 1): -1}, {(0, 1): 0}, {(0, 1): 1}, {(0, 1): 0}]
    found = VerdictStatistics.of(candidates, verdicts)
    assert (found.ties.value, found.ties.count) == (0.25, 4), "equal answers are no pair that was judged"
    assert (found.longer_wins.value, found.longer_wins.count) == (0.5, 2)
    cycle = VerdictStatistics.of([Candidates("p", ("x", "yy", "zzz"))], [{(0, 1): 1, (1, 2): 1, (0, 2): -1}])
    assert (cycle.contradicted.value, cycle.contradicted.count) == (1.0, 3)


def vote(number: int, shown: tuple[int, ...], levels, reply: Reply | None = None, failure: str = "") -> Vote:
    return Vote(Question(number, shown, "", ""), reply or Reply(text="t"), levels, failure, is_cached=False)


def ballot(*groups: list[Vote]) -> Ballot:
    return Ballot(
        JUDGE, list(groups), [both_ways([(one.question.shown, one.verdicts) for one in group]) for group in groups]
    )


def test_consistency_and_first_shown_by_hand():
    # Swapping the order flips what is shown first: (0, 1) then (1, 0) are the same verdict, (0, 1) twice are not.
    same = [vote(0, (0, 1), (0, 1)), vote(0, (1, 0), (1, 0))]
    first = [vote(1, (0, 1), (0, 1)), vote(1, (1, 0), (0, 1))]
    ties = [vote(2, (0, 1), (0, 0)), vote(2, (1, 0), (0, 0))]
    half = [vote(3, (0, 1), (0, 1)), vote(3, (1, 0), None, failure=NO_VERDICT)]
    given = ballot(same, first, ties, half)
    assert given.verdicts == [{(0, 1): 1}, {(0, 1): 0}, {(0, 1): 0}, {}]
    asked = ReplyStatistics.of([pair(number) for number in range(4)], given)
    assert (asked.consistent.value, asked.consistent.count) == (pytest.approx(2 / 3), 3)
    assert (asked.first_shown_wins.value, asked.first_shown_wins.count) == (pytest.approx(4 / 5), 5)
    assert asked.failures == {NO_VERDICT: 1}
    assert asked.parse_failures == 1
    assert asked.questions == asked.fresh == 8


def test_consistency_of_lists_is_counted_pair_by_pair():
    row = Candidates("p", ("x", "yy", "zzz"))
    # 2 > 0 > 1 when shown 0 1 2, and 2 > 1 > 0 when shown 2 1 0: two of three pairs agree.
    votes = [vote(0, (0, 1, 2), (1, 2, 0)), vote(0, (2, 1, 0), (0, 1, 2))]
    asked = ReplyStatistics.of([row], ballot(votes))
    assert (asked.consistent.value, asked.consistent.count) == (pytest.approx(2 / 3), 3)


def test_tokens_cost_and_letters_are_added_up():
    replies = [
        Reply(text="x", prompt_tokens=10, completion_tokens=2, cost=0.5, is_estimated=True),
        Reply(text="y", cost=1),
    ]
    asked = ReplyStatistics.of(
        [pair(0)], ballot([vote(0, (0, 1), (0, 1), replies[0]), vote(0, (1, 0), (1, 0), replies[1])])
    )
    assert (asked.prompt_tokens, asked.completion_tokens, asked.cost, asked.estimated) == (10, 2, 1.5, 1)
    assert asked.says_a_letter is None
    local = [Reply(chances=(0.2, 0.1)), Reply(chances=(0.5, 0.1))]
    asked = ReplyStatistics.of(
        [pair(0)], ballot([vote(0, (0, 1), (0, 1), local[0]), vote(0, (1, 0), (0, 1), local[1])])
    )
    assert asked.says_a_letter == pytest.approx(0.45)


def test_mean_probability_looks_beneath_a_preference_for_a_place():
    # Always the first shown, but more surely where that is answer 1.
    group = [
        vote(0, (0, 1), (0, 1), Reply(chances=(0.6, 0.4))),
        vote(0, (1, 0), (0, 1), Reply(chances=(0.9, 0.1))),
    ]
    assert averaged(ballot(group)) == [{(0, 1): -1}]
    assert averaged(ballot([vote(0, (0, 1), (0, 1))])) is None


def test_two_judges_are_compared_where_both_decide():
    first = [{(0, 1): 1, (0, 2): 0}, {(0, 1): 1}]
    second = [{(0, 1): 1, (0, 2): 1}, {(0, 1): -1}]
    rate = between(first, second, ["p", "q"])
    assert (rate.value, rate.count) == (0.5, 2)


def rate(value: float, count: int = 100, width: float = 0.1) -> Rate:
    return Rate(value, value - width, value + width, count)


def said(**changes) -> list[str]:
    """Findings about a judge that is as it should be, but for the changes."""
    asked = {
        "questions": 200,
        "failures": {},
        "consistent": rate(0.9),
        "first_shown_wins": rate(0.5),
        "says_a_letter": None,
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "cost": 0.0,
        "estimated": 0,
        "fresh": 1,
    }
    longer = changes.pop("longer_wins", rate(0.6))
    known = changes.pop("known", None)
    verdict_statistics = VerdictStatistics(rate(0.1), longer, rate(0.0))
    return list(warnings_of_judge("one", ReplyStatistics(**(asked | changes)), verdict_statistics, known))


def test_nothing_is_said_of_a_good_judge():
    assert said() == []


@pytest.mark.parametrize(
    ("changes", "is_doubt", "words"),
    [
        ({"consistent": rate(0.5)}, False, "the same verdict in both orders on 50% of pairs"),
        ({"longer_wins": rate(0.8)}, True, "prefers the longer completion in 80% of 100 pairs"),
        ({"longer_wins": rate(0.2)}, True, "prefers the shorter completion in 80% of 100 pairs"),
        ({"failures": {NO_VERDICT: 5}}, False, "no verdict on 5 of 200 questions (5 no verdict in the reply)"),
        ({"failures": {TOO_LONG: 1}}, False, "cannot read 1 of 200 questions"),
        ({"says_a_letter": 0.1}, True, "10% of the probability"),
        ({"estimated": 3}, False, "did not report the tokens of 3 of 200 replies"),
    ],
)
def test_what_deserves_a_warning_gets_one(changes, is_doubt, words):
    (warning,) = said(**changes)
    assert words in warning.text
    assert (warning.about, bool(warning.advice), warning.is_doubt) == ("one", True, is_doubt)


@pytest.mark.parametrize(
    "changes",
    [
        {"consistent": rate(0.5, count=5)},
        {"longer_wins": rate(0.8, count=5)},
        {"longer_wins": rate(0.7, width=0.3)},
        {"failures": {NO_VERDICT: 4}},
        {"says_a_letter": 0.9},
    ],
)
def test_too_little_to_tell_is_not_told(changes):
    assert said(**changes) == []


def test_a_judge_that_is_no_better_than_chance_is_told_so():
    candidates = [pair(number) for number in range(60)]
    verdicts = [{(0, 1): 1 if number % 2 else -1} for number in range(60)]
    (warning,) = said(known=agreement(candidates, verdicts))
    assert "no better than chance" in warning.text
    assert warning.is_doubt
    (warning,) = said(known=agreement(candidates, [{(0, 1): -1}] * 60))
    assert "worse than chance" in warning.text
    assert said(known=agreement(candidates, [{(0, 1): 1}] * 60)) == []


def test_judges_that_hardly_agree_are_named():
    verdict_statistics = VerdictStatistics(rate(0.1), rate(0.5), rate(0.0))
    (warning,) = warnings_of_panel(verdict_statistics, None, {("one", "two"): rate(0.55), ("one", "three"): rate(0.8)})
    assert warning.about == "one and two"
    assert warning.is_doubt
    assert "prefer the same completion in 55% of 100 pairs" in warning.text


def test_calibration_names_the_figure_the_floor_and_the_file():
    people = [pair(number) for number in range(10)]
    verdicts = [{(0, 1): 1}] * 6 + [{(0, 1): 0}] * 2 + [{(0, 1): -1}] * 2
    ballots = [Ballot(JUDGE, [[]] * 10, verdicts)]
    found = Calibration.of("people.jsonl", people, ballots, verdicts)
    found.check(None)
    found.check(0.7)
    with pytest.raises(
        DataError, match=r"people\.jsonl: .* 70\.0% of 10 untied pairs .*floor: 0\.71`; nothing"
    ) as caught:
        found.check(0.71)
    assert caught.value.exit_code == 65
    assert "one 70.0%" in caught.value.message
    with pytest.raises(DataError, match="are ties"):
        Calibration.of("people.jsonl", [Candidates("p", ("a", "b"), ((0, 1),))], [], [{}])
