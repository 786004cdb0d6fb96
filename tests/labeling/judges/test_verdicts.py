"""From verdicts to rankings, by hand and by what must not matter: the order of answers, of questions, of judges."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.labeling.judges.verdicts import (
    both_ways,
    contradicted,
    majority,
    pairs_of,
    points,
    spread,
    tiers_of,
    verdicts_in,
    verdicts_of,
)


def test_a_reply_is_turned_into_verdicts_on_the_answers_themselves():
    assert verdicts_in((1, 0), (0, 1)) == {(0, 1): -1}  # the first shown, answer 1, wins
    assert verdicts_in((0, 1), (0, 1)) == {(0, 1): 1}
    assert verdicts_in((0, 1), (0, 0)) == {(0, 1): 0}
    assert verdicts_in((2, 0, 1), (0, 1, 1)) == {(0, 2): -1, (1, 2): -1, (0, 1): 0}


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ({(0, 1): 1}, {(0, 1): 1}, {(0, 1): 1}),
        ({(0, 1): 1}, {(0, 1): -1}, {(0, 1): 0}),
        ({(0, 1): 1}, {(0, 1): 0}, {(0, 1): 0}),
        ({(0, 1): 0}, {(0, 1): 0}, {(0, 1): 0}),
        ({(0, 1): 1}, {}, {}),
        ({}, {}, {}),
    ],
)
def test_both_orders_have_to_agree_and_both_have_to_be_there(one, other, both):
    assert both_ways([((0, 1), one), ((1, 0), other)]) == both
    assert both_ways([((1, 0), other), ((0, 1), one)]) == both


def test_one_order_alone_decides_where_only_one_was_asked():
    assert both_ways([((0, 1), {(0, 1): -1})]) == {(0, 1): -1}
    assert both_ways([]) == {}


def test_questions_about_other_pairs_have_no_say():
    asked = [((0, 1), {(0, 1): 1}), ((1, 0), {(0, 1): 1}), ((2, 0), {(0, 2): -1}), ((0, 2), {}), ((1, 2), {(1, 2): 0})]
    assert both_ways(asked) == {(0, 1): 1, (1, 2): 0}


@pytest.mark.parametrize(
    ("votes", "outcome"),
    [
        ((1, 1, -1), 1),
        ((1, 0, -1), 0),
        ((1, -1), 0),
        ((1, 0), 0),
        ((1, 1, 0), 1),
        ((0, 0, 1), 0),
        ((1, 1, -1, 0), 1),
        ((1, 1, -1, -1, 0), 0),
        ((1, 1, 0, 0, -1), 0),
        ((-1,), -1),
    ],
)
def test_most_judges_decide_and_a_draw_is_a_tie(votes, outcome):
    for order in set(itertools.permutations(votes)):
        assert majority([{(0, 1): vote} for vote in order]) == {(0, 1): outcome}
    turned = majority([{(0, 1): -vote} for vote in votes])
    assert turned == {(0, 1): -outcome}


def test_a_judge_without_a_verdict_does_not_vote():
    assert majority([{(0, 1): 1}, {}, {(1, 2): -1}]) == {(0, 1): 1, (1, 2): -1}
    assert majority([{}, {}]) == {}


def test_points_and_tiers_by_hand():
    # 0 beats 1 and 2, ties 3; 1 beats 2; 3 beats 1; 2 against 3 is unknown.
    verdicts = {(0, 1): 1, (0, 2): 1, (0, 3): 0, (1, 2): 1, (1, 3): -1}
    assert points(verdicts, 4) == [2.5, 1.0, 0.5, 2.0]
    assert tiers_of(verdicts, 4) == ((0,), (3,), (1,), (2,))
    assert contradicted(verdicts, tiers_of(verdicts, 4)) == 0


def test_a_cycle_is_a_tie():
    cycle = {(0, 1): 1, (1, 2): 1, (0, 2): -1}
    assert tiers_of(cycle, 3) == ((0, 1, 2),)
    assert contradicted(cycle, tiers_of(cycle, 3)) == 3
    # A cycle under a best answer stays one tier under it.
    under = {(0, 1): 1, (0, 2): 1, (0, 3): 1, (1, 2): 1, (2, 3): 1, (1, 3): -1}
    assert tiers_of(under, 4) == ((0,), (1, 2, 3))


@st.composite
def weak_orders(draw):
    levels = draw(st.lists(st.integers(0, 4), min_size=2, max_size=7))
    return tuple(tuple(index for index, at in enumerate(levels) if at == level) for level in sorted(set(levels)))


@given(weak_orders())
@settings(max_examples=60, deadline=None)
def test_verdicts_that_are_an_order_give_that_order(tiers):
    count = sum(map(len, tiers))
    assert tiers_of(verdicts_of(tiers), count) == tiers
    assert contradicted(verdicts_of(tiers), tiers) == 0


@given(st.integers(2, 6), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_permuting_the_answers_permutes_the_tiers(count, random):
    verdicts = {pair: random.choice((-1, 0, 1)) for pair in pairs_of(count) if random.random() < 0.9}
    place = random.sample(range(count), count)  # answer i goes to place[i]
    moved = {
        (min(place[i], place[j]), max(place[i], place[j])): said if place[i] < place[j] else -said
        for (i, j), said in verdicts.items()
    }
    expected = tuple(tuple(sorted(place[index] for index in tier)) for tier in tiers_of(verdicts, count))
    assert tiers_of(moved, count) == expected


def test_equal_answers_share_every_verdict():
    found = spread({(0, 1): -1}, ["x", "y", "x"])
    assert found == {(0, 1): -1, (0, 2): 0, (1, 2): 1}
    assert tiers_of(found, 3) == ((1,), (0, 2))
    assert spread({}, ["same", "same"]) == {(0, 1): 0}
    assert spread({}, ["x", "y"]) == {}
