"""What can be told from a number of prompts, before and after an evaluation, in plain sentences."""

from __future__ import annotations

import math

from rlhf_cli.intervals import (
    ENOUGH_PROMPTS,
    Measure,
    half_width,
    is_undecided,
    joint_level,
    percent,
    percent_span,
)

_MOST_PROMPTS = 1_000_000


PRECISION = "precision of a win rate near 50%"
"""Name of `expected_precision` among the sizes of a stage."""


def expected_precision(prompts: int) -> str:
    """Return how precisely a win rate near one half will be known, such as "about +- 12.3 points"."""
    return f"about +- {100 * half_width(prompts):.0f} points"


def prompts_for(reach: float, level: float = 0.95) -> int:
    """Return the smallest number of prompts with which a win rate near one half is known to +- `reach`.

    Args:
        reach: half of the interval's width, above 0, as a share.
        level: coverage of the interval.
    """
    low, high = 1, 1
    while half_width(high, level) > reach and high < _MOST_PROMPTS:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if half_width(middle, level) > reach else (low, middle)
    return high


def conclusion(win_rate: Measure, policy: str, baseline: str, *, comparisons: int = 1) -> str:
    """Return one sentence: which model is better, or that these prompts do not show it and how many would.

    Args:
        win_rate: of the policy against the baseline, with the interval that decides: that of `joint_level`.
        policy: name of the policy.
        baseline: name of the baseline.
        comparisons: number of pairs that were compared; their sentences hold together.
    """
    suffix = f"; 95% holds for all {comparisons} pairs together" if comparisons > 1 else ""
    return _conclusion(win_rate, policy, baseline, joint_level(comparisons)) + suffix


def _conclusion(win_rate: Measure, policy: str, baseline: str, level: float) -> str:
    value, low, high = win_rate.value, win_rate.low, win_rate.high
    assert value is not None and low is not None and high is not None  # noqa: PT018
    prompts = f"{win_rate.n:,} prompt{'' if win_rate.n == 1 else 's'}"
    if not is_undecided(low, high):
        better, worse, least = (policy, baseline, low) if value > 0.5 else (baseline, policy, 1.0 - high)
        at_least = percent(math.floor(1000 * least) / 1000)
        return f"{better} is better than {worse}: preferred on at least {at_least} of such prompts ({prompts})"
    verb, them = ("is", "it") if win_rate.n == 1 else ("are", "them")
    found = f"{verb} too few to say" if win_rate.n < ENOUGH_PROMPTS else "do not show"
    sentence = (
        f"{prompts} {found} which of {policy} and {baseline} is better: a win rate from {percent_span(low, high)} is "
        f"compatible with {them}"
    )
    distance = abs(value - 0.5)
    if distance < 0.005:
        return sentence
    count = _rounded(prompts_for(distance, level))
    return f"{sentence}; if the true rate is {percent(value)}, about {count:,} prompts would show it"


def _rounded(count: int) -> int:
    """Round up to two digits: the number is an estimate."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return -(-count // unit) * unit
