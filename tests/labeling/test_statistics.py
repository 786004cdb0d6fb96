"""Statistics of labels: by hand on small ones, by what is known of made-up labellers, and what must not matter."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.errors import DataError
from rlhf_cli.intervals import PromptSums, resampled_sums, wilson_interval, worth_of
from rlhf_cli.labeling.agreement import krippendorff_alpha
from rlhf_cli.labeling.label_records import LabelRecord
from rlhf_cli.labeling.statistics import statistics
from rlhf_cli.labeling.statistics_report import Figure, LabelReport
from tests.labeling.crowd import Person, crowd


def label(item: str, annotator: str, *tiers: int | tuple[int, ...], **more) -> LabelRecord:
    """A ranking of as many answers as `tiers` hold, each of ten characters for every place in the item."""
    as_tuples = tuple(tier if isinstance(tier, tuple) else (tier,) for tier in tiers)
    answers = sum(map(len, as_tuples))
    texts = tuple(f"{index}" * 10 * (index + 1) for index in range(answers))
    return LabelRecord(item, f"prompt {item}", texts, annotator, tiers=as_tuples, **more)


def kinds(report: LabelReport, about: str | None = None) -> set[str]:
    return {warning.kind for warning in report.warnings if about is None or warning.about == about}


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
    # The item's third answer is the longest, its first the shortest; 2 and 0 are shown first.
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
    assert any("1 of 3 labels do not say in which order" in sentence for sentence in report.unknown)


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
    assert ben.self_consistency == Figure(missing="no hidden repeat was ranked")


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
        pytest.param([replace(label("x", "ana", 0, 1), tiers=((0,),))], "each of the 2 answers", id="one missing"),
        pytest.param([label("x", "ana", 0, 1, shown=(0, 0))], "each of the 2 answers", id="shown twice"),
        pytest.param([label("x", "ana", 0, 1), label("x", "ben", 0, 1, 2)], "other answers", id="one id, two items"),
    ],
)
def test_labels_that_contradict_themselves_are_errors(labels, said):
    with pytest.raises(DataError, match=said):
        statistics(labels, seed=0)


PEOPLE = [Person("ana", tie=0.2), Person("ben", noise=1.0, tie=0.1), Person("cid", first=0.5)]


@given(st.randoms(use_true_random=False), st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_names_order_and_the_numbering_of_answers_do_not_matter(random, seed):
    labels = crowd(PEOPLE, items=12, overlap=3, answers=3, gold=2, seed=seed)
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


def test_perfect_labellers_agree_perfectly_and_dice_do_not():
    perfect = statistics(crowd([Person("a", noise=0), Person("b", noise=0)], items=40, gold=3), seed=0)
    for figure in (perfect.agreement.with_ties, perfect.agreement.alpha, perfect.agreement.tau_b, perfect.gold):
        assert figure.value == pytest.approx(1.0)
    assert perfect.self_consistency.value == 1.0
    dice = statistics(crowd([Person("a", noise=1e6), Person("b", noise=1e6)], items=600), seed=0)
    assert dice.agreement.with_ties.value == pytest.approx(0.5, abs=0.03)
    for figure in (dice.agreement.alpha, dice.agreement.fleiss, dice.agreement.tau_b):
        assert figure.value == pytest.approx(0.0, abs=0.05)


def test_intervals_hold_the_truth_as_often_as_they_say():
    # The first-shown rate of labellers without a habit is 1/2: 95 % of intervals hold it, few prompts or many.
    for items in (12, 60):
        held = 0
        for seed in range(60):
            found = statistics(crowd([Person("a"), Person("b")], items=items, seed=seed), seed=0).first_shown
            assert found.low is not None
            assert found.high is not None
            held += found.low <= 0.5 <= found.high
        assert held >= 52, f"{held} of 60 at {items} prompts"


def test_the_interval_draws_prompts_and_not_pairs():
    one = [label("x", name, *range(4), shown=tuple(range(4))) for name in ("ana", "ben")]
    alike = [replace(copy, item=f"{number}", prompt="the same prompt") for number in range(40) for copy in one]
    apart = [replace(copy, item=f"{number}", prompt=f"prompt {number}") for number in range(40) for copy in one]
    widths = []
    for labels in (alike, apart):
        figure = statistics(labels, seed=0).agreement.with_ties
        assert figure.low is not None
        widths.append(1.0 - figure.low)
    assert widths[0] > 0.7, "one prompt, however often, proves nothing"
    assert 0.05 < widths[1] < 0.1, "40 prompts without a fault are no proof that there is none"


def test_a_labeller_who_clicks_the_first_answer_is_found():
    people = [*(Person(f"p{number}") for number in range(4)), Person("hasty", noise=0, first=100, seconds=1.5)]
    report = statistics(crowd(people, items=250, overlap=2, gold=10, repeats=0.1), seed=0)
    assert kinds(report, "hasty") == {"agreement", "gold", "self-consistency", "order", "speed", "habit"}
    hasty = next(person for person in report.annotators if person.name == "hasty")
    assert hasty.first_shown.value == 1.0
    assert hasty.habit is not None
    assert hasty.habit.pattern == "A>B>C>D"
    for number in range(4):
        assert not kinds(report, f"p{number}")
    assert kinds(report, "all labels") == {"order"}
    for warning in report.warnings:
        assert warning.text
        assert warning.advice


def test_a_group_without_fault_is_rarely_blamed():
    # At most 1 in 20 for the order of everybody, and 1 in 20 for that of somebody.
    blamed = 0
    for seed in range(20):
        labels = crowd([Person(f"p{number}", noise=0.4, tie=0.1) for number in range(6)], items=120, seed=seed)
        blamed += bool(statistics(labels, seed=0).warnings)
    assert blamed <= 6


def test_too_few_overlaps_say_how_many_more():
    alone = statistics(crowd([Person("ana"), Person("ben")], items=30, overlap=1), seed=0)
    assert alone.more_prompts == 323
    (warning,) = [one for one in alone.warnings if one.kind == "overlap"]
    assert "323 prompts" in warning.advice
    few = statistics(crowd([Person("ana"), Person("ben")], items=6), seed=0)
    figure = few.agreement.with_ties
    assert figure.low is not None
    assert figure.high is not None
    half = (figure.high - figure.low) / 2
    assert few.more_prompts == pytest.approx(6 * ((half / 0.05) ** 2 - 1), abs=1)
    assert "overlap" in kinds(few)
    many = statistics(crowd([Person("ana"), Person("ben")], items=400), seed=0)
    assert many.more_prompts == 0
    assert "overlap" not in kinds(many)


def test_one_person_two_guidelines_and_a_prompt_nobody_ranks_are_warnings():
    labels = [
        label(f"i{number}", "ana", 0, 1, guidelines="a" * 64 if number < 10 else "b" * 64) for number in range(30)
    ]
    odd = replace(label("odd", "ana", 0, 1), outcome="skipped", tiers=(), reason="no question")
    labels += [odd, replace(odd, annotator="ben", outcome="flagged", reason="private data")]
    report = statistics(labels, seed=0)
    assert kinds(report) >= {"one person", "guidelines", "skipped prompt", "overlap"}
    (skipped,) = [warning for warning in report.warnings if warning.kind == "skipped prompt"]
    assert skipped.about == "prompt odd"
    assert "no question, private data" in skipped.text
    assert report.guidelines == {"b" * 64: 20, "a" * 64: 10}
    assert report.counts.reasons == {"no question": 1, "private data": 1}


def test_wilson_by_hand():
    # Wilson (1927): at p = 1 the lower end is n / (n + z^2).
    assert wilson_interval(1.0, 10)[0] == pytest.approx(10 / (10 + 1.959964**2), abs=1e-6)
    assert wilson_interval(0.0, 10)[1] == pytest.approx(1 - 10 / (10 + 1.959964**2), abs=1e-6)
    low, high = wilson_interval(0.5, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))


def test_worth_of_prompts():
    ones = np.arange(200)
    # 100 of 200 single pairs: as good as independent, but for the freedom that 199 leave.
    single = worth_of(PromptSums(ones, np.column_stack([ones % 2, np.ones(200)]).astype(float)))
    assert single == pytest.approx(200, rel=0.03)
    # Ten pairs a prompt, all alike: each prompt counts once.
    alike = worth_of(PromptSums(ones, np.column_stack([10 * (ones % 2), np.full(200, 10)]).astype(float)))
    assert alike == pytest.approx(200, rel=0.03)
    # Four prompts of one pair each leave three degrees of freedom: t is 3.182 where the normal has 1.96.
    few = worth_of(PromptSums(ones[:4], np.column_stack([ones[:4] % 2, np.ones(4)]).astype(float)))
    assert few == pytest.approx(0.25 * 3 / 4 / (4 * 0.25 / 16) * (1.96 / 3.182) ** 2, rel=0.02)
    # Nothing varies: Kish's number.
    same = worth_of(PromptSums(ones[:2], np.array([[3.0, 3.0], [1.0, 1.0]])))
    assert same == pytest.approx(16 / 10)


def test_resampled_sums_of_all_columns_see_the_same_draws():
    values = np.arange(6, dtype=float).reshape(3, 2)
    whole = PromptSums(np.arange(3), values)
    part = PromptSums(np.array([2]), values[2:])
    rest = PromptSums(np.arange(2), values[:2])
    one, two, three = resampled_sums([whole, part, rest], 3, resamples=50, seed=0)
    assert one == pytest.approx(two + three)
    assert one[:, 1] - one[:, 0] == pytest.approx(np.full(50, 3.0)), "every resample draws three prompts"
    assert len(np.unique(one[:, 0])) > 3
