"""Coefficients of agreement against published worked examples, by hand, and by what they must not depend on."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlhf_cli.labeling.statistics.agreement import (
    NO_OVERLAP,
    ONE_CATEGORY,
    category_counts,
    cohen_kappa,
    confusion_table,
    fleiss_kappa,
    gwet_ac1,
    gwet_ac2,
    kendall_tau_b,
    krippendorff_alpha,
    mirrored,
    mirrored_alpha,
    mirrored_table,
    pairwise_agreement,
    verdicts,
    weight_matrix,
)

N = None
# Krippendorff (2011), example C; also Gwet (2014), page 120: four annotators, twelve units, categories 1 to 5.
FOUR_OBSERVERS = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3),
    (N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N),
)
FOUR = category_counts([[None if one is None else one - 1 for one in own] for own in FOUR_OBSERVERS], 5)

# Fleiss (1971), table 1: 30 patients, six psychiatrists each, five diagnoses.
PSYCHIATRISTS = """
    00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031
    00501 30012 51000 02040 10203 00006 01050 02013 20040 10041 05010 40002 02040 10500 00006
"""
DIAGNOSES = np.array([[int(digit) for digit in row] for row in PSYCHIATRISTS.split()])

COUNTS = arrays(np.int64, st.tuples(st.integers(1, 12), st.integers(2, 4)), elements=st.integers(0, 4))
TABLES = st.integers(2, 4).flatmap(lambda size: arrays(np.int64, (size, size), elements=st.integers(0, 9)))
COEFFICIENTS = (pairwise_agreement, fleiss_kappa, gwet_ac1, gwet_ac2, krippendorff_alpha)


def test_cohens_own_example():
    # Cohen (1960), table 1: shares of 200 cases; p_o = 0.70, p_e = 0.41.
    shares = [[0.44, 0.07, 0.09], [0.05, 0.20, 0.05], [0.01, 0.03, 0.06]]
    assert cohen_kappa([[200 * share for share in row] for row in shares]).value == pytest.approx(0.29 / 0.59)


def test_weighted_kappa_by_hand():
    # 10 of both, three categories. Linear credit of neighbors 1/2, quadratic 3/4.
    table = [[4, 1, 0], [1, 2, 0], [1, 0, 1]]
    # Rows 0.5, 0.3, 0.2; columns 0.6, 0.3, 0.1. Exact: p_o = 0.7, p_e = 0.30 + 0.09 + 0.02.
    assert cohen_kappa(table).value == pytest.approx((0.7 - 0.41) / 0.59)
    near = 0.5 * 0.3 + 0.3 * 0.6 + 0.3 * 0.1 + 0.2 * 0.3  # by chance one apart
    linear = 0.41 + near / 2
    assert cohen_kappa(table, "linear").value == pytest.approx((0.7 + 0.2 / 2 - linear) / (1 - linear))
    quadratic = 0.41 + near * 3 / 4
    assert cohen_kappa(table, "quadratic").value == pytest.approx((0.7 + 0.2 * 3 / 4 - quadratic) / (1 - quadratic))


def test_fleiss_own_table():
    assert DIAGNOSES.sum(axis=0).tolist() == [26, 26, 30, 55, 43]
    # P = 0.5556 and P_e = 0.2199 there, rounded to 0.430.
    assert fleiss_kappa(DIAGNOSES).value == pytest.approx(0.430, abs=5e-4)
    assert pairwise_agreement(DIAGNOSES).value == pytest.approx(0.5556, abs=5e-5)


def test_krippendorffs_own_example():
    assert krippendorff_alpha(FOUR, "nominal").value == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(FOUR, "ordinal").value == pytest.approx(0.815, abs=5e-4)


def test_gwets_own_example():
    assert gwet_ac1(FOUR).value == pytest.approx(0.77544, abs=5e-6)
    assert gwet_ac2(FOUR).value == pytest.approx(0.914, abs=5e-4)
    assert fleiss_kappa(FOUR).value == pytest.approx(0.76117, abs=5e-6)


def test_gwet_ac1_of_two_annotators_by_hand():
    # 40 and 45 agreed, 10 and 5 not: p_o = 0.85, p = 0.475, p_e = 2 x 0.475 x 0.525.
    counts = [[2, 0]] * 40 + [[0, 2]] * 45 + [[1, 1]] * 15
    by_chance = 2 * 0.475 * 0.525
    assert gwet_ac1(counts).value == pytest.approx((0.85 - by_chance) / (1 - by_chance))


def test_ac1_stays_near_agreement_where_kappa_collapses():
    counts = [[2, 0]] * 98 + [[1, 1]] * 2
    kappa, ac1 = fleiss_kappa(counts).value, gwet_ac1(counts).value
    assert kappa is not None
    assert ac1 is not None
    assert kappa < 0 < 0.97 < ac1


def test_pandalm_three_annotators(shared_data: Path):
    rows = json.loads((shared_data / "pandalm_3annotators.json").read_text())
    ratings = [[int(row[f"annotator{number}"]) for row in rows] for number in (1, 2, 3)]
    counts = category_counts(ratings, 3)
    kappas = [cohen_kappa(confusion_table(one, other, 3)).value for one, other in combinations(ratings, 2)]
    assert [f"{kappa:.4f}" for kappa in kappas] == ["0.8520", "0.8789", "0.8617"]
    assert f"{fleiss_kappa(counts).value:.5f}" == "0.86418"
    assert f"{krippendorff_alpha(counts).value:.5f}" == "0.86422"


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_without_overlap_there_is_no_coefficient_and_a_reason(coefficient):
    for counts in ([[1, 0, 0], [0, 1, 0]], [[0, 0, 0]], category_counts([[0, 1, 2]], 3), np.zeros((0, 3))):
        found = coefficient(counts)
        assert found.value is None
        assert found.missing == NO_OVERLAP
    assert cohen_kappa(confusion_table([0, N, 1], [N, 1, N], 2)).missing == NO_OVERLAP


def test_one_category_has_no_kappa_but_full_agreement():
    counts = [[0, 3, 0]] * 4
    assert pairwise_agreement(counts).value == 1.0
    for found in (fleiss_kappa(counts), krippendorff_alpha(counts), cohen_kappa([[0, 0], [0, 7]])):
        assert found.value is None
        assert found.missing == ONE_CATEGORY
    # AC1 knows that there were other categories to choose.
    assert gwet_ac1(counts).value == pytest.approx(1.0)
    assert gwet_ac1([[2], [2]]).missing == ONE_CATEGORY


def test_missing_labels_leave_out_a_unit_for_that_annotator_only():
    table = confusion_table([0, 1, N, 1], [0, N, 1, 0], 2)
    assert table.tolist() == [[1, 0], [1, 0]]
    counts = category_counts([[0, 1, N], [0, N, N], [1, 1, 0]], 2)
    assert counts.tolist() == [[2, 1], [0, 2], [1, 0]]
    assert pairwise_agreement(counts).value == pytest.approx((1 + 1 + 0) / (3 + 1 + 0))


@given(COUNTS, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_order_of_units_does_not_matter_and_no_value_is_nan(counts, random):
    order = list(range(len(counts)))
    random.shuffle(order)
    for coefficient in COEFFICIENTS:
        found, again = coefficient(counts), coefficient(counts[order])
        assert found.value == (None if again.value is None else pytest.approx(again.value))
        assert (found.value is None) == bool(found.missing)
        assert found.value is None or (np.isfinite(found.value) and found.value <= 1.0 + 1e-9)


@given(COUNTS, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_names_of_unordered_categories_do_not_matter(counts, random):
    order = list(range(counts.shape[1]))
    random.shuffle(order)
    for coefficient in (pairwise_agreement, fleiss_kappa, gwet_ac1, krippendorff_alpha):
        found, again = coefficient(counts).value, coefficient(counts[:, order]).value
        assert found == (None if again is None else pytest.approx(again))


@given(TABLES, st.sampled_from(["none", "linear", "quadratic"]))
@settings(max_examples=60, deadline=None)
def test_kappa_does_not_depend_on_who_is_first(table, weights):
    found, again = cohen_kappa(table, weights).value, cohen_kappa(table.T, weights).value
    assert found == (None if again is None else pytest.approx(again))


@given(st.lists(st.integers(0, 2), min_size=2, max_size=30).filter(lambda own: len(set(own)) > 1), st.integers(2, 5))
@settings(max_examples=40, deadline=None)
def test_complete_agreement_is_one(ratings, annotators):
    counts = category_counts([ratings] * annotators, 3)
    assert [coefficient(counts).value for coefficient in COEFFICIENTS] == pytest.approx([1.0] * len(COEFFICIENTS))
    assert cohen_kappa(confusion_table(ratings, ratings, 3), "linear").value == pytest.approx(1.0)


def test_independent_labels_agree_no_more_than_by_chance():
    draw = np.random.default_rng(0)
    ratings = draw.choice(3, size=(3, 6000), p=[0.6, 0.3, 0.1]).tolist()
    counts = category_counts(ratings, 3)
    table = confusion_table(ratings[0], ratings[1], 3)
    chance_corrected = [cohen_kappa(table), cohen_kappa(table, "quadratic"), fleiss_kappa(counts)]
    chance_corrected += [krippendorff_alpha(counts), krippendorff_alpha(counts, "ordinal")]
    assert [found.value for found in chance_corrected] == pytest.approx([0.0] * 5, abs=0.03)
    assert pairwise_agreement(counts).value == pytest.approx(0.36 + 0.09 + 0.01, abs=0.02)


def test_weights_by_hand():
    assert weight_matrix(3, "linear").tolist() == [[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]]
    assert weight_matrix(3, "quadratic").tolist() == [[1, 0.75, 0], [0.75, 1, 0.75], [0, 0.75, 1]]
    assert weight_matrix(1, "linear").tolist() == [[1.0]]


def test_verdicts_of_a_ranking_with_a_tie():
    # Completions 0 and 2 share the first tier, 1 is worse: (0, 1) a, (0, 2) tie, (1, 2) b.
    assert verdicts(np.array([[0, 1, 0]])).tolist() == [[0, 1, 2]]


def test_mirrored_verdicts_do_not_depend_on_which_completion_is_called_a():
    # Both say "a" of everything, once a slip: plain kappa would call that chance.
    counts = np.array([[2, 0, 0]] * 9 + [[1, 0, 1]])
    turned = counts.copy()
    turned[::2] = turned[::2, ::-1]
    assert fleiss_kappa(counts).value != pytest.approx(fleiss_kappa(turned).value)
    for coefficient in COEFFICIENTS:
        assert coefficient(mirrored(counts)).value == pytest.approx(coefficient(mirrored(turned)).value)
    # Without ties, chance agreement of mirrored verdicts is 1/2: (0.9 - 0.5) / 0.5.
    assert fleiss_kappa(mirrored(counts)).value == pytest.approx(0.8)
    assert cohen_kappa(mirrored_table([[9, 0, 1], [0, 0, 0], [0, 0, 0]])).value == pytest.approx(0.8)


@given(arrays(np.int64, st.tuples(st.integers(1, 12), st.just(3)), elements=st.integers(0, 4)))
@settings(max_examples=60, deadline=None)
def test_alpha_from_sums_is_alpha_from_counts(counts):
    shared = counts[counts.sum(axis=1) >= 2]
    seen = shared.sum(axis=1)
    disagreed = ((seen**2 - (shared**2).sum(axis=1)) / (seen - 1)).sum()
    found = mirrored_alpha(np.array([disagreed, seen.sum(), shared[:, 1].sum()]))
    expected = krippendorff_alpha(mirrored(counts)).value
    assert np.isnan(found) if expected is None else found == pytest.approx(expected)


def test_tau_b_by_hand():
    orders = verdicts(np.array([[0, 1, 2, 3], [1, 0, 2, 3], [3, 2, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]]))
    straight, swapped, reverse, halves, tied = orders
    assert kendall_tau_b(straight, straight) == pytest.approx(1.0)
    assert kendall_tau_b(straight, reverse) == pytest.approx(-1.0)
    assert kendall_tau_b(straight, swapped) == pytest.approx((5 - 1) / 6)
    assert kendall_tau_b(straight, halves) == pytest.approx(4 / np.sqrt(6 * 4))
    assert np.isnan(kendall_tau_b(straight, tied))
