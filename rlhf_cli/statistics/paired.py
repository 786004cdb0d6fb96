"""Paired comparisons of two models on the same prompts: sign test, and the mean of the differences."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cli.intervals import Measure, binomial_p_value, mean_interval, standard_error, student_p_value

NO_SPREAD = "all differences are equal"
ONE_PROMPT = "there is one prompt"
NOT_FINITE = "a value is not finite"


@dataclass(frozen=True)
class SignTest:
    """An exact sign test over prompts (Conover 1999, section 3.4); ties say nothing and are omitted.

    Attributes:
        wins: prompts with a positive difference.
        losses: prompts with a negative difference.
        ties: prompts without a difference.
        p_value: probability of a result at least as uneven if wins and losses were equally likely, two-sided.
    """

    wins: int
    losses: int
    ties: int
    p_value: float

    def to_json(self) -> dict[str, Any]:
        """Return the plain values."""
        return {"wins": self.wins, "losses": self.losses, "ties": self.ties, "p_value": self.p_value}


def sign_test(differences: Sequence[float]) -> SignTest:
    """Test whether positive differences are as likely as negative ones.

    Args:
        differences: one per prompt, for example its share of won completions minus 1/2.
    """
    wins, losses = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    return SignTest(wins, losses, len(differences) - wins - losses, binomial_p_value(wins, losses))


@dataclass(frozen=True)
class PairedDifference:
    """Mean of paired differences.

    Attributes:
        mean: with Student's interval.
        standard_error: of the mean; 0 for a single prompt.
        p_value: of Student's paired t-test, two-sided; None without an interval.
    """

    mean: Measure
    standard_error: float
    p_value: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the mean and its interval with the test."""
        return {**self.mean.to_json(), "standard_error": self.standard_error, "p_value": self.p_value}


def paired_difference(differences: Sequence[float]) -> PairedDifference:
    """Mean of differences that are paired by prompt, with Student's interval and test (Student 1908).

    Differences without any spread have no interval: few prompts with equal differences do not make a mean certain.

    Args:
        differences: one per prompt; not empty.
    """
    mean, count, error = sum(differences) / len(differences), len(differences), standard_error(differences)
    measure = mean_of(differences)
    p_value = None if measure.low is None else student_p_value(mean / error, count - 1)
    return PairedDifference(measure, error, p_value)


def mean_of(values: Sequence[float]) -> Measure:
    """Mean of independent values, such as one per prompt, with Student's interval; `values` are not empty."""
    mean = sum(values) / len(values)
    if not math.isfinite(mean):
        return Measure(mean, None, None, len(values), NOT_FINITE)
    error = standard_error(values)
    if not error > 1e-12 * max(1.0, abs(mean)):
        return Measure(mean, None, None, len(values), ONE_PROMPT if len(values) == 1 else NO_SPREAD)
    return Measure(mean, *mean_interval(values), len(values))


def by_prompt(prompts: Sequence[Hashable], values: Sequence[float]) -> list[float]:
    """Return the mean of the values of each prompt, in the order in which the prompts first appear.

    Args:
        prompts: (N,) key of the prompt of each value.
        values: (N,).
    """
    grouped: dict[Hashable, list[float]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        grouped.setdefault(prompt, []).append(value)
    return [sum(own) / len(own) for own in grouped.values()]


def ratio_of_sums(numerators: Sequence[float], denominators: Sequence[float]) -> Measure:
    """Ratio of two sums over prompts, such as nats per token, with Student's interval of its linearization.

    The ratio r moves by (a_i - r b_i) / sum(b) with prompt i (Cochran 1977, section 6.4).

    Args:
        numerators: one per prompt.
        denominators: one per prompt, none negative, not all 0.
    """
    total, count = sum(denominators), len(numerators)
    ratio = sum(numerators) / total
    moves = [above - ratio * below for above, below in zip(numerators, denominators, strict=True)]
    spread = mean_of([ratio + count * move / total for move in moves])
    return Measure(ratio, spread.low, spread.high, count, spread.missing)
