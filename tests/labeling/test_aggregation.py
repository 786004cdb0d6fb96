"""One ranking out of several: by hand on small cases, the same for everybody, refused where it cannot be."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.data.records import Message, Ranking
from rlhf_cli.errors import DataError, UsageError
from rlhf_cli.labeling import aggregation as merging
from rlhf_cli.labeling.aggregation import (
    PRIOR,
    aggregate,
    aggregate_rankings,
    bradley_terry,
    bradley_terry_strengths,
    group_of,
    majority,
    plackett_luce,
    plackett_luce_strengths,
)
from rlhf_cli.labeling.label_records import LabelRecord

METHODS = {"majority": majority, "bradley-terry": bradley_terry, "plackett-luce": plackett_luce}


def label(tiers, annotator="a", item="i", completions=("x", "y", "z"), **fields) -> LabelRecord:
    return LabelRecord(item, "p", tuple(completions[: sum(map(len, tiers))]), annotator, tiers=tiers, **fields)


@pytest.mark.parametrize(
    ("levels", "tiers"),
    [
        pytest.param([[0, 1, 2]], ((0,), (1,), (2,)), id="one annotator"),
        pytest.param([[2, 0, 1]], ((1,), (2,), (0,)), id="one annotator, another order"),
        pytest.param([[0, 0, 1]], ((0, 1), (2,)), id="one annotator, a tie"),
        pytest.param([[0, 0, 0]], ((0, 1, 2),), id="one annotator, all equal"),
        pytest.param([[0, 1], [0, 1], [1, 0]], ((0,), (1,)), id="two against one"),
        pytest.param([[0, 1], [1, 0]], ((0, 1),), id="one against one"),
        pytest.param([[0, 1], [0, 0]], ((0,), (1,)), id="one and a tie"),
        pytest.param([[0, 1, 2], [1, 2, 0], [2, 0, 1]], ((0, 1, 2),), id="a circle"),
        pytest.param([[0, 1, 2, 3], [0, 2, 3, 1], [0, 3, 1, 2]], ((0,), (1, 2, 3)), id="one above a circle"),
        pytest.param([[0, 1, 2], [0, 1, 2], [2, 0, 1]], ((0,), (1,), (2,)), id="a majority that Borda shares in part"),
    ],
)
def test_majority_by_hand(levels, tiers):
    assert majority(levels) == tiers


def test_majority_follows_pairs_where_counting_places_would_not():
    """Five rankings in which x beats y and z three to two, while y wins more comparisons."""
    levels = [[0, 1, 2]] * 3 + [[2, 0, 1]] * 2
    assert majority(levels) == ((0,), (1,), (2,))
    assert bradley_terry(levels) == ((1,), (0,), (2,))  # y wins 7 of 10 comparisons, x 6, z 2


@pytest.mark.parametrize("way", ["bradley-terry", "plackett-luce"])
@pytest.mark.parametrize(
    ("levels", "tiers"),
    [
        pytest.param([list(range(9))], tuple((i,) for i in range(9)), id="one annotator: separated data converge"),
        pytest.param([list(range(4))] * 40, ((0,), (1,), (2,), (3,)), id="forty who agree"),
        pytest.param([[0, 0, 1, 1]], ((0, 1), (2, 3)), id="ties"),
        pytest.param([[0, 1], [1, 0]], ((0, 1),), id="one against one"),
        pytest.param([[0, 1, 2], [1, 2, 0], [2, 0, 1]], ((0, 1, 2),), id="a circle"),
        pytest.param([[0, 1], [0, 1], [1, 0]], ((0,), (1,)), id="two against one"),
    ],
)
def test_fits_by_hand(way, levels, tiers):
    assert METHODS[way](levels) == tiers


def test_plackett_luce_weighs_who_is_chosen_first():
    """x is best twice and last twice, y always second, z and w share the rest: the first choice counts most for x."""
    levels = [[0, 1, 2, 3], [0, 1, 3, 2], [3, 1, 0, 2], [3, 1, 2, 0]]
    assert bradley_terry(levels)[0] == (1,)
    [best, *_] = plackett_luce(levels)
    assert best == (1,)
    first_often = [[0, 2, 1, 3], [0, 3, 2, 1], [0, 1, 3, 2], [3, 0, 1, 2]]
    assert plackett_luce(first_often)[0] == bradley_terry(first_often)[0] == (0,)


@pytest.mark.parametrize(("wins", "losses", "ties"), [(1, 0, 0), (3, 1, 0), (2, 0, 5), (0, 1, 1)])
def test_strengths_of_two_completions_solve_the_equation(wins, losses, ties):
    """The optimum has s_x = -s_y = d/2 and PRIOR d = (wins + ties/2) sigmoid(-d) - (losses + ties/2) sigmoid(d)."""
    levels = [[0, 1]] * wins + [[1, 0]] * losses + [[0, 0]] * ties
    x, y = bradley_terry_strengths(levels)
    sigmoid = 1 / (1 + math.exp(y - x))
    assert x == pytest.approx(-y, abs=1e-6)
    expected = (wins + ties / 2) * (1 - sigmoid) - (losses + ties / 2) * sigmoid
    assert PRIOR * (x - y) == pytest.approx(expected, abs=1e-6)


def test_strengths_of_choices_solve_the_equation():
    """Of x > y > z, d/ds_z of PRIOR sum s^2 - log P is 0: z stands by when x is chosen and when y is."""
    x, y, z = map(math.exp, plackett_luce_strengths([[0, 1, 2]]))
    assert 2 * PRIOR * math.log(z) + z / (x + y + z) + z / (y + z) == pytest.approx(0, abs=1e-6)
    assert 2 * PRIOR * math.log(x) + x / (x + y + z) - 1 == pytest.approx(0, abs=1e-6)


def test_a_tie_is_chosen_completion_by_completion_from_itself_and_all_below():
    """Of x ~ y > z: x is chosen from x, y and z, and so is y."""
    x, y, z = map(math.exp, plackett_luce_strengths([[0, 0, 1]]))
    assert x == pytest.approx(y, abs=1e-6)
    assert 2 * PRIOR * math.log(z) + 2 * z / (x + y + z) == pytest.approx(0, abs=1e-6)


levels_of_three_to_five = st.integers(2, 5).flatmap(
    lambda count: st.lists(st.lists(st.integers(0, count - 1), min_size=count, max_size=count), min_size=1, max_size=4)
)


@settings(max_examples=40, deadline=None)
@given(levels_of_three_to_five, st.randoms(use_true_random=False))
@pytest.mark.parametrize("way", list(METHODS))
def test_the_order_of_annotators_and_of_completions_changes_nothing(way, levels, random):
    tiers = METHODS[way](levels)
    assert METHODS[way](random.sample(levels, len(levels))) == tiers
    names = random.sample(range(len(levels[0])), len(levels[0]))  # completion i is now called names[i]
    renamed = [[level[names.index(index)] for index in range(len(level))] for level in levels]
    assert METHODS[way](renamed) == tuple(tuple(sorted(names[index] for index in tier)) for tier in tiers)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=5), st.integers(1, 4))
@pytest.mark.parametrize("way", list(METHODS))
def test_annotators_who_agree_are_repeated(way, level, count):
    tiers = tuple(tuple(i for i, own in enumerate(level) if own == tier) for tier in sorted(set(level)))
    assert METHODS[way]([level] * count) == tiers


@settings(max_examples=60, deadline=None)
@given(levels_of_three_to_five)
def test_where_majorities_form_an_order_it_is_that_order(levels):
    count = len(levels[0])
    lead = [[sum((l[i] < l[j]) - (l[i] > l[j]) for l in levels) for j in range(count)] for i in range(count)]  # noqa: E741
    at_least = [[lead[i][j] >= 0 for j in range(count)] for i in range(count)]
    triples = itertools.permutations(range(count), 3)
    if all(at_least[i][k] or not (at_least[i][j] and at_least[j][k]) for i, j, k in triples):
        place = {index: tier for tier, members in enumerate(majority(levels)) for index in members}
        for i, j in itertools.permutations(range(count), 2):
            assert (place[i] <= place[j]) == at_least[i][j]


# Labels


@pytest.mark.parametrize("method", ["individual", *METHODS])
def test_only_ordinary_rankings_count(method):
    tiers = ((1,), (0,), (2,))
    labels = [
        label(((0,), (1,), (2,)), "b", purpose="gold"),
        label(((0,), (1,), (2,)), "b", purpose="repeat"),
        LabelRecord("i", "p", ("x", "y", "z"), "c", outcome="skipped"),
        LabelRecord("j", "p", ("x", "y"), "c", outcome="flagged", reason="rude"),
        label(tiers, "a"),
    ]
    [ranking] = aggregate(labels, method)
    assert ranking.tiers == tiers
    assert ranking.annotator == ("a" if method == "individual" else None)


def test_individual_labels_are_kept_as_they_are():
    labels = [label(((0,), (1,)), "a", strength=4), label(((1,), (0,)), "b"), label(((0, 1),), "a", item="j")]
    assert aggregate(labels, "individual") == [one.ranking() for one in labels]
    assert aggregate(labels, "individual")[0].margin == 1.0


def test_items_come_in_the_order_of_their_first_label():
    labels = [label(((0,), (1,)), who, item=item) for item, who in (("z", "a"), ("a", "a"), ("z", "b"), ("m", "a"))]
    labels = [replace(one, prompt=one.item) for one in labels]
    assert [ranking.prompt for ranking in aggregate(labels, "majority")] == ["z", "a", "m"]


def test_of_one_annotator_the_latest_counts():
    old, new = label(((0,), (1,)), at="2026-01-01T00:00:00.000Z"), label(((1,), (0,)), at="2026-01-02T00:00:00.000Z")
    for labels in ([old, new], [new, old]):
        assert aggregate(labels, "majority")[0].tiers == ((1,), (0,))
    assert aggregate([old, new, label(((0,), (1,)), "b")], "majority")[0].tiers == ((0, 1),)


@pytest.mark.parametrize(
    ("strengths", "margin"),
    [
        pytest.param([("better", 4), ("better", 3)], (1 + 2 / 3) / 2, id="both agree"),
        pytest.param([("better", 4), ("better", 4), ("worse", 2)], (1 + 1 - 1 / 3) / 3, id="one against"),
        pytest.param([("better", 2), ("better", 2), ("worse", 4)], 0.0, id="never below 0"),
        pytest.param([("better", 4), ("better", None)], None, id="one did not say"),
        pytest.param([("better", 4), ("tie", None)], 0.5, id="a tie is 0"),
    ],
)
def test_margins_are_averaged(strengths, margin):
    tiers = {"better": ((0,), (1,)), "worse": ((1,), (0,)), "tie": ((0, 1),)}
    labels = [label(tiers[side], str(n), strength=strength) for n, (side, strength) in enumerate(strengths)]
    [ranking] = aggregate(labels, "majority")
    assert ranking.tiers == ((0,), (1,))
    assert ranking.margin == (None if margin is None else pytest.approx(margin))


def test_rankings_of_a_file_are_grouped_by_what_they_rank():
    user = (Message("user", "p"),)
    rows = [
        Ranking("p", ("x", "y"), ((0,), (1,)), annotator="a"),
        Ranking("q", ("x", "y"), ((0,), (1,))),
        Ranking(user, ("y", "x"), ((1,), (0,)), annotator="b"),
        Ranking("p", ("x", "y"), ((1,), (0,))),
        Ranking("p", ("x", "y"), ((0, 1),)),
    ]
    assert aggregate_rankings(rows, "individual") == rows
    aggregated = aggregate_rankings(rows, "majority")
    assert aggregated == [Ranking("p", ("x", "y"), ((0,), (1,))), Ranking("q", ("x", "y"), ((0,), (1,)))]


def test_equal_completions_are_told_apart_by_their_place():
    first = Ranking("p", ("x", "x", "y"), ((0, 1), (2,)), annotator="a")
    other = Ranking("p", ("y", "x", "x"), ((1, 2), (0,)), annotator="b")
    assert aggregate_rankings([first, other], "majority")[0].tiers == ((0, 1), (2,))


def test_groups_do_not_run_into_each_other():
    ids = {group_of(Ranking(p, c, ((0, 1),))) for p, c in (("p", ("a", "b")), ("pa", ("", "b")), ("p", ("ab", "")))}
    assert len(ids) == 3


def test_labels_of_one_item_with_different_completions_are_refused():
    with pytest.raises(DataError, match="different completions"):
        aggregate([label(((0,), (1,)), "a"), label(((0,), (1,)), "b", completions=("x", "other"))], "majority")


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "choix", None)
    labels = [label(((0,), (1,)))]
    assert len(aggregate(labels, "majority")) == len(aggregate(labels, "individual")) == 1
    for method in ("bradley-terry", "plackett-luce"):
        with pytest.raises(UsageError) as caught:
            aggregate(labels, method)
        assert "pip install 'rlhf-cli[merge]'" in str(caught.value.hint)
        with pytest.raises(UsageError):
            merging.check_installed(method)
