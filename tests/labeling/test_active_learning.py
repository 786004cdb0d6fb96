"""Active choice by hand, and what changes nothing: order, shifts of rewards, what models think of held-out prompts."""

from __future__ import annotations

import dataclasses
import random
from itertools import combinations
from math import log, log2

import numpy as np
import pytest

from rlhf_cli.labeling.active_learning import (
    Item,
    Selection,
    best_subset,
    held_out_share,
    pair_scores,
    preferences,
    select,
)


def item(key: str, *rewards: list[float], completions: str | None = None, is_held_out: bool = False) -> Item:
    texts = tuple(completions or "abcdefghijklmnopqrst"[: len(rewards[0])])
    return Item(key, texts, is_held_out, np.array(rewards, dtype=float))


def random_items(count: int, models: int, completions: int = 5, held_out: float = 0.0, seed: int = 0) -> list[Item]:
    """Rewards are eighths, so that a shift by a whole number is exact."""
    draw = np.random.default_rng(seed)
    return [
        Item(
            f"prompt {number}",
            tuple(f"completion {number} {k}" for k in range(completions)),
            number < held_out * count,
            draw.integers(-24, 25, size=(models, completions)) / 8,
        )
        for number in range(count)
    ]


def of(item: Item) -> np.ndarray:
    """Its rewards, which it has."""
    assert item.rewards is not None
    return item.rewards


def named(items: list[Item], choice: Selection) -> dict[str, tuple]:
    """A choice without numbers of places: prompt -> texts to label, score, rank."""
    return {
        items[one.item].key: (
            {items[one.item].completions[number] for number in one.completions},
            one.score,
            one.rank,
            one.is_held_out,
        )
        for one in choice.selected
    }


def test_a_preference_is_the_sigmoid_of_a_difference_and_never_overflows():
    p = preferences(np.array([[0.0, log(3)], [0.0, -2_000.0]]))
    assert p[0] == pytest.approx(np.array([[0.5, 0.25], [0.75, 0.5]]))
    assert p[1].tolist() == [[0.5, 1.0], [0.0, 0.5]]


@pytest.mark.parametrize(
    ("by", "rewards", "expected"),
    [
        pytest.param("uncertainty", [[1.0, 1.0]], 1.0, id="p = 1/2: one bit"),
        pytest.param("uncertainty", [[0.0, log(3)]], 2 - 0.75 * log2(3), id="p = 3/4: 0.811 bits"),
        pytest.param("uncertainty", [[0.0, 2_000.0]], 0.0, id="certain: nothing to learn"),
        pytest.param("disagreement", [[0.0, log(3)], [log(3), 0.0]], 0.25, id="3/4 against 1/4"),
        pytest.param("disagreement", [[0.0, 0.0], [1.0, 1.0]], 0.0, id="both unsure: they agree"),
        pytest.param("disagreement", [[0, 0], [0, log(3)], [log(3), 0]], (0.125 / 3) ** 0.5, id="of three"),
    ],
)
def test_what_a_pair_promises(by, rewards, expected: float):
    scores = pair_scores(np.array(rewards, dtype=float), by)
    assert scores == pytest.approx(np.array([[0.0, expected], [expected, 0.0]]))


def test_a_prompt_scores_the_mean_over_the_pairs_that_are_labeled():
    # Two completions alike and one far away: a pair of one bit, two pairs of none.
    items = [item("one close pair", [0.0, 0.0, 2_000.0]), item("all at 3/4", [0.0, log(3)])]
    all_completions = select(items, by="uncertainty", prompts=1, completions=None, seed=0)
    assert [(one.item, one.rank) for one in all_completions.selected] == [(1, 1)]
    assert all_completions.selected[0].score == pytest.approx(0.811278, abs=1e-6)
    assert all_completions.not_selected == pytest.approx([1 / 3])
    two_completions = select(items, by="uncertainty", prompts=1, completions=2, seed=0)
    assert [(one.item, one.completions, one.score) for one in two_completions.selected] == [(0, (0, 1), 1.0)]


def test_completions_are_those_whose_pairs_score_most():
    rewards = [[5.0, 0.0, 0.1, 9.0, 0.2, 0.0]]
    (one,) = select([item("p", *rewards)], by="uncertainty", prompts=1, completions=3, seed=0).selected
    assert one.completions in ((1, 2, 5), (2, 4, 5), (1, 4, 5), (1, 2, 4))
    scores = pair_scores(np.array(rewards), "uncertainty")
    best = max(sum(scores[a, b] for a, b in combinations(three, 2)) for three in combinations(range(6), 3))
    assert one.score == pytest.approx(best / 3)


def test_a_subset_is_exact_where_all_can_be_tried_and_else_near_it():
    draw = np.random.default_rng(1)
    for size, count in ((6, 2), (8, 4), (12, 6), (16, 8), (20, 3)):
        half = np.triu(draw.random((size, size)), k=1)
        scores = half + half.T
        found = best_subset(scores, count)
        totals = {subset: scores[np.ix_(subset, subset)].sum() / 2 for subset in combinations(range(size), count)}
        assert found in totals
        best = max(totals.values())
        if len(totals) <= 1_000:
            assert totals[found] == pytest.approx(best)
        else:
            # Greedy is at least far above an ordinary subset, and holds the best pair.
            assert totals[found] > np.quantile(list(totals.values()), 0.95)
            assert set(np.unravel_index(scores.argmax(), scores.shape)) <= set(found)


def test_no_completion_is_taken_twice_where_no_pair_promises_anything():
    for size, count in ((6, 3), (20, 10)):  # exact, greedy
        assert len(set(best_subset(np.zeros((size, size)), count))) == count


def test_disagreement_knows_a_tie_that_all_models_see_and_uncertainty_does_not():
    tie, disputed = item("tie", [0, 0], [0, 0]), item("disputed", [0, 2], [2, 0])
    by_ensemble = select([tie, disputed], by="disagreement", prompts=1, completions=None, seed=0)
    assert [one.item for one in by_ensemble.selected] == [1]
    first_model = [dataclasses.replace(one, rewards=of(one)[:1]) for one in (tie, disputed)]
    by_one = select(first_model, by="uncertainty", prompts=1, completions=None, seed=0)
    assert [one.item for one in by_one.selected] == [0]


@pytest.mark.parametrize("by", ["random", "uncertainty", "disagreement"])
def test_order_of_prompts_and_completions_changes_nothing(by):
    items = random_items(30, 3, held_out=0.2)
    shuffle = random.Random(0)
    for completions in (None, 3):
        expected = named(items, select(items, by=by, prompts=11, completions=completions, seed=4))
        assert len(expected) == 11
        for _ in range(3):
            moved = []
            for one in shuffle.sample(items, len(items)):
                order = shuffle.sample(range(5), 5)
                texts, rewards = tuple(one.completions[number] for number in order), of(one)[:, order]
                moved.append(dataclasses.replace(one, completions=texts, rewards=rewards))
            assert named(moved, select(moved, by=by, prompts=11, completions=completions, seed=4)) == expected


@pytest.mark.parametrize("by", ["uncertainty", "disagreement"])
def test_a_shift_of_a_model_changes_nothing_and_a_scale_does(by):
    items = random_items(30, 3)
    chosen = select(items, by=by, prompts=10, completions=3, seed=0)
    shift = np.array([[3.0], [-7.0], [64.0]])
    shifted = [dataclasses.replace(one, rewards=of(one) + shift) for one in items]
    assert select(shifted, by=by, prompts=10, completions=3, seed=0) == chosen
    scaled = [dataclasses.replace(one, rewards=of(one) * 5) for one in items]
    assert select(scaled, by=by, prompts=10, completions=3, seed=0) != chosen


def test_a_seed_decides_what_is_random_and_nothing_else():
    items = random_items(40, 1)

    def numbers(by, seed: int) -> list[int]:
        return [one.item for one in select(items, by=by, prompts=8, completions=None, seed=seed).selected]

    assert numbers("random", 1) == numbers("random", 1) != numbers("random", 2)
    assert numbers("uncertainty", 1) == numbers("uncertainty", 2)
    equal = [dataclasses.replace(one, rewards=np.zeros((1, 5))) for one in items]
    tied = [
        {one.item for one in select(equal, by="uncertainty", prompts=8, completions=2, seed=s).selected} for s in (1, 2)
    ]
    assert tied[0] != tied[1]  # not the first eight of the file


def test_more_prompts_keep_those_that_fewer_chose():
    items = random_items(40, 2, held_out=0.25)
    for by in ("random", "disagreement"):
        few, more = (
            {one.item for one in select(items, by=by, prompts=count, completions=3, seed=0).selected}
            for count in (12, 24)
        )
        assert few < more


@pytest.mark.parametrize("by", ["uncertainty", "disagreement"])
@pytest.mark.parametrize("completions", [None, 2])
def test_held_out_prompts_keep_their_share_and_are_the_same_for_every_strategy(by, completions: int | None):
    # Held-out prompts score far above all others: a choice that looked at them would take every one.
    items = random_items(50, 2, held_out=0.2)
    items = [dataclasses.replace(one, rewards=of(one) * (1 if one.is_held_out else 9)) for one in items]
    blind = [dataclasses.replace(one, rewards=None) if one.is_held_out else one for one in items]
    choice = select(items, by=by, prompts=20, completions=completions, seed=3)
    assert choice == select(blind, by=by, prompts=20, completions=completions, seed=3)
    held_out = [one for one in choice.selected if one.is_held_out]
    assert len(held_out) == 4
    assert {(one.score, one.rank) for one in held_out} == {(None, None)}
    at_random = select(items, by="random", prompts=20, completions=completions, seed=3)
    assert held_out == [one for one in at_random.selected if one.is_held_out]
    assert sorted(one.rank or 0 for one in choice.selected if not one.is_held_out) == list(range(1, 17))


@pytest.mark.parametrize(
    ("train", "held_out", "prompts", "expected"),
    [
        pytest.param(80, 20, 40, 8, id="a fifth"),
        pytest.param(80, 20, 4, 1, id="rounded"),
        pytest.param(98, 2, 10, 1, id="at least one, or nothing could be measured"),
        pytest.param(2, 98, 10, 9, id="and at least one to train on"),
        pytest.param(80, 20, 1, 0, id="a single prompt is to train on"),
        pytest.param(80, 0, 40, 0, id="none is held out"),
        pytest.param(0, 20, 5, 5, id="all are held out"),
        pytest.param(8, 2, 10, 2, id="all prompts"),
        pytest.param(8, 2, 99, 2, id="more than all prompts"),
    ],
)
def test_the_held_out_share_of_a_choice(train: int, held_out: int, prompts: int, expected: int):
    assert held_out_share(train, held_out, prompts) == expected


@pytest.mark.parametrize("by", ["random", "uncertainty"])
def test_prompts_whose_completions_are_all_equal_are_out_of_the_question(by):
    items = [
        item("same", [0.0, 0.0, 0.0], completions="xxx"),
        item("two", [0.0, 5.0]),
        item("one", [0.0], completions="x"),
    ]
    choice = select(items, by=by, prompts=3, completions=None, seed=0)
    assert ([one.item for one in choice.selected], choice.identical) == ([1], [0, 2])


@pytest.mark.parametrize("by", ["random", "uncertainty"])
def test_equal_completions_count_once(by):
    # x stands there three times: a pair of it with itself has p = 1/2, and would be the most uncertain of all.
    both = item("p", [0.0, 0.0, 3.0, 0.0, 1.0], completions="xxyxz")
    (one,) = select([both], by=by, prompts=1, completions=2, seed=0).selected
    assert len({both.completions[number] for number in one.completions}) == 2
    (fewer,) = select([both], by=by, prompts=1, completions=4, seed=0).selected
    assert fewer.completions == (0, 2, 4)
    (everything,) = select([both], by=by, prompts=1, completions=None, seed=0).selected
    assert everything.completions == (0, 1, 2, 3, 4)


def test_all_prompts_are_taken_where_there_are_fewer_than_asked_for():
    items = random_items(5, 1, held_out=0.4)
    for by in ("random", "uncertainty"):
        choice = select(items, by=by, prompts=9, completions=2, seed=0)
        assert [one.item for one in choice.selected] == [0, 1, 2, 3, 4]
        assert choice.not_selected == []


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        pytest.param(None, r"2 completions need rewards of shape \(M, 2\), not None", id="missing"),
        pytest.param(np.zeros((1, 3)), r"of shape \(M, 2\), not \(1, 3\)", id="of other completions"),
        pytest.param(np.array([[0.0, np.nan]]), "not finite", id="NaN"),
    ],
)
def test_rewards_that_no_choice_could_use(rewards, message: str):
    with pytest.raises(ValueError, match=message):
        select([Item("p", ("a", "b"), False, rewards)], by="uncertainty", prompts=1, completions=None, seed=0)
