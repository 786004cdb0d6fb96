"""Statistics of labels: by hand on small ones, by what is known of simulated annotators, and what must not matter."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.errors import DataError
from rlhf_cli.labeling.label_records import LabelRecord
from rlhf_cli.labeling.statistics.agreement import krippendorff_alpha
from rlhf_cli.labeling.statistics.report import Estimate
from rlhf_cli.labeling.statistics.summary import statistics
from tests.labeling.crowd import Person, crowd, label

# Of x, ana and ben agree on (0, 1) and (0, 2) and not on (1, 2); of y, ben ties (0, 1).
BY_HAND = [
    label("x", "ana", 0, 1, 2),
    label("x", "ben", 0, 2, 1),
    label("y", "ana", 0, 1, 2),
    label("y", "ben", (0, 1), 2),
]


def test_agreement_by_hand():
    report = statistics(BY_HAND, seed=0)
    found = report.agreement
    assert found.with_ties.value == pytest.approx((2 + 2) / 6)
    assert found.with_ties.count == 6
    assert found.with_ties.prompts == 2
    assert found.without_ties.value == pytest.approx((2 + 2) / (3 + 2))
    # tau-b: x (2 - 1) / 3; y 2 / sqrt(3 x 2).
    assert found.tau_b.value == pytest.approx((1 / 3 + 2 / 6**0.5) / 2)
    # Of 12 verdicts one is a tie. By chance ana (no tie) and ben (1/6) agree on 5/6 x 1/2.
    assert report.tie_share == pytest.approx(1 / 12)
    assert found.fleiss.value == pytest.approx((4 / 6 - (1 / 144 + 121 / 288)) / (1 - (1 / 144 + 121 / 288)))
    assert report.counts.items == report.counts.shared_items == 2


def test_a_tie_of_both_is_agreement_only_where_ties_count():
    labels = [
        label("x", "ana", (0, 1), 2),
        label("x", "ben", (0, 1), 2),
        label("y", "ana", 0, 1),
        label("y", "ben", 1, 0),
    ]
    found = statistics(labels, seed=0).agreement
    assert (found.with_ties.value, found.with_ties.count) == (pytest.approx(3 / 4), 4)
    assert (found.without_ties.value, found.without_ties.count) == (pytest.approx(2 / 3), 3)


def test_tau_is_a_mean_over_items_however_many_ranked_them():
    reverse = [label("x", "ana", 0, 1, 2), label("x", "ben", 2, 1, 0)]
    same = [label("y", name, 0, 1, 2) for name in ("ana", "ben", "cid", "dan")]
    found = statistics(reverse + same, seed=0).agreement
    assert found.tau_b.value == pytest.approx((-1 + 1) / 2)
    assert found.with_ties.value == pytest.approx(18 / 21), "pairs of annotators weigh alike"


def test_agreement_of_the_others_is_what_remains_without_somebody():
    labels = crowd([Person("a"), Person("b"), Person("c", noise=3)], items=80, overlap=3, seed=2)
    report = statistics(labels, seed=0)
    assert [person.name for person in report.annotators] == ["a", "b", "c"]
    for person in report.annotators:
        without = statistics([one for one in labels if one.annotator != person.name], seed=0).agreement.with_ties
        assert person.others.value == pytest.approx(without.value)
        assert (person.others.count, person.others.prompts) == (without.count, without.prompts)
        assert (person.others.low, person.others.high) == (
            pytest.approx(without.low, abs=0.02),
            pytest.approx(without.high, abs=0.02),
        )


def test_kappa_of_two_annotators_by_hand():
    labels = [
        replace(one, item=f"{one.item}{copy}", prompt=f"{one.item}{copy}") for copy in range(5) for one in BY_HAND
    ]
    (pair,) = statistics(labels, seed=0).agreement.pairs
    assert (pair.first, pair.second, pair.items, pair.pairs) == ("ana", "ben", 10, 30)
    assert pair.agreement == pytest.approx(4 / 6)
    assert pair.kappa == pytest.approx((4 / 6 - 5 / 12) / (1 - 5 / 12))
    assert statistics(BY_HAND, seed=0).agreement.pairs == (), "two items are too few for a kappa"


def test_first_shown_and_longer_wins_by_hand():
    # The item's third completion is the longest, its first the shortest; 2 and 0 are shown first.
    labels = [
        label("x", "ana", 0, 1, 2, shown=(2, 1, 0)),  # every earlier-shown loses; every longer loses
        label("y", "ana", 2, (0, 1), shown=(0, 1, 2)),  # 2 beats both earlier ones; the longer wins twice
        label("z", "ana", 0, 1, 2),  # order unknown; every longer loses
    ]
    report = statistics(labels, seed=0)
    assert report.first_shown.value == 0.0
    assert report.first_shown.count == 5
    assert report.longer.value == pytest.approx(2 / 8)
    again = replace(labels[0], purpose="repeat", at="9")
    assert statistics([*labels, again], seed=0).longer == report.longer, "a repeat tells nothing new of the text"
    assert statistics([*labels, again], seed=0).first_shown.count == 5 + 3, "but its order is another"
    assert report.distribution.winners == {3: pytest.approx((0.0, 0.0, 1.0))}
    assert report.distribution.tiers == {2: 1, 3: 2}
    tied = [label("t", "ana", (0, 2), 1, shown=(2, 1, 0)), label("u", "ana", 0, 1, 2, shown=(0, 1, 2))]
    assert statistics(tied, seed=0).distribution.winners == {3: pytest.approx((0.75, 0.0, 0.25))}
    assert any("1 of 3 labels have no order of presentation" in sentence for sentence in report.unknown)


def test_repeats_count_for_self_consistency_and_not_for_agreement():
    labels = [
        label("x", "ana", 0, 1, 2, at="1"),
        label("x", "ana", 0, 2, 1, at="2", purpose="repeat"),
        label("x", "ben", 0, 1, 2, at="3"),
    ]
    report = statistics(labels, seed=0)
    assert report.self_consistency.value == pytest.approx(2 / 3)
    assert report.agreement.with_ties.value == 1.0
    assert report.agreement.with_ties.count == 3
    assert report.counts.repeats == 1
    ben = next(person for person in report.annotators if person.name == "ben")
    assert ben.self_consistency == Estimate(missing="no hidden repeat was ranked")


def test_gold_counts_a_tie_as_half_right_and_no_pair_whose_order_is_unknown():
    known = ((0,), (1, 2))
    labels = [
        label("g", "ana", 0, 1, 2, purpose="gold", known=known),  # both known pairs right
        label("g", "ben", (0, 1), 2, purpose="gold", known=known),  # one tied, one right
    ]
    report = statistics(labels, seed=0)
    assert report.gold.value == pytest.approx((2 + 1.5) / 4)
    assert report.agreement.with_ties.value is None, "gold items are easier than others"
    assert report.agreement.with_ties.missing


def test_a_later_label_of_the_same_person_replaces_the_earlier():
    labels = [label("x", "ana", 0, 1, at="2"), label("x", "ana", 1, 0, at="1"), label("x", "ben", 0, 1, at="3")]
    report = statistics(labels, seed=0)
    assert report.counts.replaced == 1
    assert report.agreement.with_ties.value == 1.0


def test_strengths_have_a_distribution_and_an_agreement():
    labels = [
        label(f"i{number}", name, *order, strength=strength)
        for number in range(12)
        for name, order, strength in (("ana", (0, 1), 1 + number % 4), ("ben", (0, 1), 1 + (number + 1) % 4))
    ]
    report = statistics(labels, seed=0)
    assert report.distribution.strengths == {1: 6, 2: 6, 3: 6, 4: 6}
    assert report.agreement.with_ties.value == 1.0
    # On nine degrees, three of four items are one apart (credit 63/64), one is three apart (credit 55/64).
    total = sum(1 - (one - other) ** 2 / 64 for one in range(9) for other in range(9))
    by_chance = total / (9 * 8) * 8 * (1 / 8) * (7 / 8)
    observed = (3 * (63 / 64) + 55 / 64) / 4
    assert report.agreement.strengths.value == pytest.approx((observed - by_chance) / (1 - by_chance))


def test_opposite_verdicts_of_full_strength_are_as_far_apart_as_can_be():
    orders = [(0, 1)] * 3 + [(1, 0)]
    labels = [
        label(f"i{number}", name, *order, strength=4)
        for number, ben in enumerate(orders)
        for name, order in (("ana", (0, 1)), ("ben", ben))
    ]
    # By chance both ends are equally likely: p (1 - p) sums to 1/2.
    total = sum(1 - (one - other) ** 2 / 64 for one in range(9) for other in range(9))
    by_chance = total / 72 / 2
    found = statistics(labels, seed=0).agreement.strengths
    assert found.value == pytest.approx((3 / 4 - by_chance) / (1 - by_chance))


def test_marks_by_criterion():
    marks = [((5, 3), (5, 4)), ((1, None), (1, 2)), ((2, 2), (2, 2))]
    labels = [
        label(f"i{number}", name, 0, 1, marks={"helpful": given})
        for number, both in enumerate(marks)
        for name, given in zip(("ana", "ben"), both, strict=True)
    ]
    found = statistics(labels, seed=0).distribution.criteria["helpful"]
    assert found.marks == (2, 5, 1, 1, 2)
    assert found.agreement.value == pytest.approx(4 / 5)
    assert found.agreement.count == 5
    counts = [[0, 0, 0, 0, 2], [0, 0, 1, 1, 0], [2, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 2, 0, 0, 0], [0, 2, 0, 0, 0]]
    assert found.alpha.value == pytest.approx(krippendorff_alpha(counts, "ordinal").value)


def test_pace_counts_labels_faster_than_reading():
    # 30 + 20 + 10 = 60 characters: less than 0.6 s is no reading.
    seconds = [0.5, 0.7, 10.0, 20.0, 30.0]
    labels = [
        label(f"i{number}", "ana", 0, 1, 2, active_seconds=time, at=str(number)) for number, time in enumerate(seconds)
    ]
    labels.append(replace(label("s", "ana", 0, 1, active_seconds=38.8), outcome="skipped", tiers=()))
    pace = statistics(labels, seed=0).annotators[0].pace
    assert pace is not None
    assert (pace.labels, pace.median, pace.lower, pace.upper, pace.fast) == (5, 10.0, 0.7, 20.0, 1)
    assert pace.per_hour == pytest.approx(3600 * 5 / 100)
    assert pace.course == ((5, 10.0),)


def test_nothing_is_nan_and_everything_has_a_reason():
    skipped = replace(label("x", "ana", 0, 1), outcome="skipped", tiers=(), reason="unclear")
    tied = [label(f"i{number}", name, (0, 1, 2)) for number in range(4) for name in ("ana", "ben")]
    for labels in ([], [skipped], [label("x", "ana", 0, 1)], tied, BY_HAND):
        report = statistics(labels, seed=0)
        text = json.dumps(report.to_json(), allow_nan=False)
        for figure in _figures(json.loads(text)):
            assert (figure["value"] is None) == bool(figure["missing"])
    all_tied = statistics(tied, seed=0).agreement
    assert all_tied.with_ties.value == 1.0
    assert all_tied.with_ties.low is not None
    assert all_tied.with_ties.low < 0.7, "four prompts prove little"
    assert all_tied.tau_b.value is None
    assert all_tied.alpha.missing.startswith("everything is in one category")


def _figures(plain):
    if isinstance(plain, dict):
        if plain.keys() >= {"value", "missing"}:
            yield plain
        plain = list(plain.values())
    if isinstance(plain, list):
        for one in plain:
            yield from _figures(one)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        pytest.param([replace(label("x", "ana", 0, 1), tiers=((0,),))], "each of the 2 completions", id="one missing"),
        pytest.param([label("x", "ana", 0, 1, shown=(0, 0))], "each of the 2 completions", id="shown twice"),
        pytest.param(
            [label("x", "ana", 0, 1), label("x", "ben", 0, 1, 2)], "other completions", id="one id, two items"
        ),
        pytest.param([label("x", "ana", 0, 1, marks={"helpful": (6, 1)})], "1 to 5", id="a mark of 6"),
        pytest.param([label("x", "ana", 0, 1, strength=0)], "1 to 4", id="a strength of 0"),
    ],
)
def test_labels_that_contradict_themselves_are_errors(labels, said):
    with pytest.raises(DataError, match=said):
        statistics(labels, seed=0)


PEOPLE = [Person("ana", tie=0.2), Person("ben", noise=1.0, tie=0.1), Person("cid", first=0.5)]


@given(st.randoms(use_true_random=False), st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_names_order_and_the_numbering_of_completions_do_not_matter(random, seed):
    labels = crowd(PEOPLE, items=12, overlap=3, completions=3, gold=2, seed=seed)
    order = {}

    def renumbered(one: LabelRecord) -> LabelRecord:
        if one.item not in order:
            order[one.item] = random.sample(range(3), 3)
        new = {old: place for place, old in enumerate(order[one.item])}
        return replace(
            one,
            annotator={"ana": "zoe", "ben": "ben", "cid": "a"}[one.annotator],
            completions=tuple(one.completions[old] for old in order[one.item]),
            tiers=tuple(tuple(sorted(new[old] for old in tier)) for tier in one.tiers),
            shown=tuple(new[old] for old in one.shown),
            known=None if one.known is None else tuple(tuple(new[old] for old in tier) for tier in one.known),
        )

    changed = [renumbered(one) for one in labels]
    random.shuffle(changed)
    first, second = statistics(labels, seed=0), statistics(changed, seed=0)
    for name in ("with_ties", "without_ties", "tau_b", "alpha", "alpha_ordinal", "fleiss", "ac1", "ac2"):
        assert getattr(second.agreement, name).value == pytest.approx(getattr(first.agreement, name).value), name
    for name in ("self_consistency", "gold", "first_shown", "longer"):
        assert getattr(second, name).value == getattr(first, name).value, name
    kappas = sorted(pair.kappa for pair in first.agreement.pairs if pair.kappa is not None)
    assert sorted(pair.kappa for pair in second.agreement.pairs if pair.kappa is not None) == pytest.approx(kappas)
    assert second.counts == first.counts
    assert second.distribution == replace(first.distribution, winners=second.distribution.winners)


def test_perfect_labelers_agree_perfectly_and_dice_do_not():
    perfect = statistics(crowd([Person("a", noise=0), Person("b", noise=0)], items=40, gold=3), seed=0)
    for figure in (perfect.agreement.with_ties, perfect.agreement.alpha, perfect.agreement.tau_b, perfect.gold):
        assert figure.value == pytest.approx(1.0)
    assert perfect.self_consistency.value == 1.0
    dice = statistics(crowd([Person("a", noise=1e6), Person("b", noise=1e6)], items=600), seed=0)
    assert dice.agreement.with_ties.value == pytest.approx(0.5, abs=0.03)
    for figure in (dice.agreement.alpha, dice.agreement.fleiss, dice.agreement.tau_b):
        assert figure.value == pytest.approx(0.0, abs=0.05)
