"""Coefficients of agreement between annotators: counts in, one number out, or the reason why it is undefined.

There are two kinds of input. A confusion table (Q, Q) of two annotators: how often the first chose one category and the
second another. Counts (N, Q) of any number of annotators: how many of them put unit N into category Q. Units may have
different annotators and different numbers of them; a unit without labels is a row of zeros.

For rankings a unit is a pair of completions, with the categories of `verdicts`; see `mirrored` for why they are
special.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Weights = Literal["none", "linear", "quadratic"]
Level = Literal["nominal", "ordinal"]
Counts = NDArray[np.int64]

A_WINS, TIE, B_WINS = 0, 1, 2
"""Categories of a pair of completions (a, b)."""
VERDICTS = 3

NO_OVERLAP = "nothing was labeled by two annotators"
ONE_CATEGORY = "everything is in one category, so chance agreement would be complete too"


@dataclass(frozen=True)
class Coefficient:
    """A coefficient of agreement: 1 is complete agreement, 0 chance agreement (for raw agreement: none).

    Attributes:
        value: None if undefined.
        missing: reason why it is undefined.
    """

    value: float | None
    missing: str = ""


def weight_matrix(categories: int, weights: Weights) -> NDArray[np.float64]:
    """Credit for each pair of categories: 1 on the diagonal, (Q, Q).

    `linear` is 1 - |i - j| / (Q - 1) (Cicchetti and Allison 1971), `quadratic` its squared distance (Fleiss and Cohen
    1973), `none` the identity.
    """
    if weights == "none" or categories < 2:
        return np.eye(categories)
    position = np.arange(categories)
    distance = np.abs(position[:, np.newaxis] - position) / (categories - 1)
    return 1.0 - (distance if weights == "linear" else distance**2)


def confusion_table(first: Sequence[int | None], second: Sequence[int | None], categories: int) -> Counts:
    """How often `first` chose one category and `second` another, over units labeled by both: (Q, Q).

    Args:
        first: category of each unit; None without a label.
        second: of the same units.
        categories: Q.
    """
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    table = np.zeros((categories, categories), dtype=np.int64)
    for a, b in both:
        table[a, b] += 1
    return table


def category_counts(ratings: Sequence[Sequence[int | None]], categories: int) -> Counts:
    """How many annotators chose each category for each unit: (N, Q).

    Args:
        ratings: per annotator, the category of each of N units; None without a label.
        categories: Q.
    """
    counts = np.zeros((len(ratings[0]) if ratings else 0, categories), dtype=np.int64)
    for own in ratings:
        for unit, category in enumerate(own):
            if category is not None:
                counts[unit, category] += 1
    return counts


def pairwise_agreement(counts: ArrayLike) -> Coefficient:
    """Share of pairs of annotators, over all units, that chose the same category; not corrected for chance.

    A unit with n annotators has n (n - 1) / 2 pairs, so units with more annotators have more weight.
    """
    each = _counts(counts)
    seen = each.sum(axis=1)
    pairs = int((seen * (seen - 1)).sum())
    return Coefficient(float((each * (each - 1)).sum() / pairs)) if pairs else Coefficient(None, NO_OVERLAP)


def cohen_kappa(confusion: ArrayLike, weights: Weights = "none") -> Coefficient:
    """Agreement of two annotators beyond chance, given how often each uses each category.

    kappa = (p_o - p_e) / (1 - p_e), p_o = sum w_ij p_ij, p_e = sum w_ij p_i. p_.j (Cohen 1960; weighted: Cohen 1968).

    Args:
        confusion: (Q, Q) counts, see `confusion_table`.
        weights: credit for similar categories, see `weight_matrix`.
    """
    table = np.asarray(confusion, dtype=np.float64)
    if not table.sum():
        return Coefficient(None, NO_OVERLAP)
    shares = table / table.sum()
    credit = weight_matrix(len(shares), weights)
    by_chance = np.outer(shares.sum(axis=1), shares.sum(axis=0))
    return _beyond_chance(float((credit * shares).sum()), float((credit * by_chance).sum()))


def fleiss_kappa(counts: ArrayLike) -> Coefficient:
    """Agreement of several annotators beyond chance, assuming that all use the categories equally often.

    P_i = sum_j n_ij (n_ij - 1) / (n_i (n_i - 1)), P_e = sum_j p_j^2 (Fleiss 1971). If units have different numbers of
    annotators, P_i is averaged over units with two or more, and p_j is the mean over units of n_ij / n_i (Gwet 2014);
    for equal numbers this is Fleiss' definition.
    """
    each = _counts(counts)
    observed = _mean_agreement(each, np.eye(each.shape[1]))
    return NONE_SHARED if observed is None else _beyond_chance(observed, float((_prevalence(each) ** 2).sum()))


def gwet_ac1(counts: ArrayLike) -> Coefficient:
    """Agreement beyond chance, where chance means guessing on hard units; robust if one category dominates.

    P_e = sum_q p_q (1 - p_q) / (Q - 1) (Gwet 2008; several annotators and missing labels: Gwet 2014). Q counts all
    categories, used or not.
    """
    return gwet_ac2(counts, "none")


def gwet_ac2(counts: ArrayLike, weights: Weights = "quadratic") -> Coefficient:
    """`gwet_ac1` with credit for similar categories.

    P_e = T_w / (Q (Q - 1)) sum_q p_q (1 - p_q), T_w the sum of all weights (Gwet 2014).
    """
    each = _counts(counts)
    categories = each.shape[1]
    credit = weight_matrix(categories, weights)
    observed = _mean_agreement(each, credit)
    if observed is None:
        return NONE_SHARED
    if categories < 2:
        return Coefficient(None, ONE_CATEGORY)
    prevalence = _prevalence(each)
    guessed = float((prevalence * (1 - prevalence)).sum()) / (categories * (categories - 1))
    return _beyond_chance(observed, float(credit.sum()) * guessed)


def krippendorff_alpha(counts: ArrayLike, level: Level = "nominal") -> Coefficient:
    """1 - D_o / D_e: observed disagreement over the disagreement of randomly paired labels (Krippendorff 2011).

    Args:
        counts: (N, Q); units with one annotator are ignored.
        level: `nominal`, or `ordinal` for ordered categories.
    """
    from krippendorff import alpha

    each = _counts(counts)
    each = each[each.sum(axis=1) >= 2]
    if not len(each):
        return NONE_SHARED
    used = each.any(axis=0)
    if used.sum() < 2:
        return Coefficient(None, ONE_CATEGORY)
    # Unused categories are never between two used ones, so dropping them changes no distance.
    return Coefficient(float(alpha(value_counts=each[:, used], level_of_measurement=level)))


def verdicts(levels: NDArray[np.integer]) -> NDArray[np.int8]:
    """Category of each pair of completions, pairs in the order of `pair_indices`: (N, K) to (N, K (K - 1) / 2).

    Args:
        levels: (N, K) tier of each completion, 0 is best.
    """
    first, second = pair_indices(levels.shape[1])
    return (1 + np.sign(levels[:, first] - levels[:, second])).astype(np.int8)


def pair_indices(completions: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices a < b of every pair of completions, in lexicographic order."""
    first, second = np.triu_indices(completions, k=1)
    return first, second


def mirrored(counts: ArrayLike) -> Counts:
    """Counts of pairs of completions as seen from both completions of each pair: (N, Q) to (2 N, Q).

    Which completion of a pair is called a is arbitrary, and chance agreement must not depend on it: if the better
    completion always came first, everyone would seem to favor one category. So each pair counts as (a, b) and as (b,
    a). This keeps agreement as it is, and makes both wins equally likely by chance.
    """
    each = _counts(counts)
    return np.concatenate([each, each[:, ::-1]])


def mirrored_table(confusion: ArrayLike) -> Counts:
    """A confusion table of pairs of completions, counted from both sides, see `mirrored`."""
    each = _counts(confusion)
    return each + each[::-1, ::-1]


def mirrored_alpha(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Nominal `krippendorff_alpha` of `mirrored` verdicts from sums over pairs of completions; NaN if undefined.

    With n labels of which t are ties, and S_o = sum n_ic n_ik / (n_i - 1) over c != k, it is
    1 - 2 (2n - 1) S_o / (4 n^2 - 4 t^2 - 2 (n - t)^2): equal to the value from counts, but sums can be resampled.

    Args:
        sums: (..., 3) S_o, n and t, over pairs of completions with two or more labels.
    """
    disagreed, labels, ties = sums[..., 0], sums[..., 1], sums[..., 2]
    by_chance = 4 * labels**2 - 4 * ties**2 - 2 * (labels - ties) ** 2
    found = np.full(labels.shape, np.nan)
    return 1.0 - np.divide((2 * labels - 1) * 2 * disagreed, by_chance, out=found, where=by_chance > 0)


def kendall_tau_b(first: NDArray[np.integer], second: NDArray[np.integer]) -> NDArray[np.float64]:
    """Rank correlation with ties (Kendall 1945): (N, P) verdicts of two annotators to (N,); NaN if one tied everything.

    tau_b = (C - D) / sqrt((P - T_1) (P - T_2)) with C concordant pairs, D discordant pairs, T_1 and T_2 ties of each.
    """
    one, other = first.astype(np.int64) - TIE, second.astype(np.int64) - TIE
    untied = np.sqrt((one != 0).sum(axis=-1) * (other != 0).sum(axis=-1))
    agreed = (one * other).sum(axis=-1)
    return np.divide(agreed, untied, out=np.full(agreed.shape, np.nan), where=untied > 0)


NONE_SHARED = Coefficient(None, NO_OVERLAP)


def _counts(counts: ArrayLike) -> Counts:
    return np.asarray(counts, dtype=np.int64)


def _mean_agreement(counts: Counts, credit: NDArray[np.float64]) -> float | None:
    """Mean credit of a random pair of labels of a unit, over units with two or more."""
    each = counts[counts.sum(axis=1) >= 2]
    if not len(each):
        return None
    seen = each.sum(axis=1)
    return float(((each * (each @ credit - 1)).sum(axis=1) / (seen * (seen - 1))).mean())


def _prevalence(counts: Counts) -> NDArray[np.float64]:
    """Mean share of each category over units."""
    each = counts[counts.sum(axis=1) >= 1]
    return (each / each.sum(axis=1, keepdims=True)).mean(axis=0)


def _beyond_chance(observed: float, expected: float) -> Coefficient:
    if 1.0 - expected < 1e-12:
        return Coefficient(None, ONE_CATEGORY)
    return Coefficient((observed - expected) / (1.0 - expected))
