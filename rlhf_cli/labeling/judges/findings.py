"""What somebody who relies on judges should be told: each finding says a figure and what to do about it."""

from __future__ import annotations

from rlhf_cli.labeling.judges.measures import Agreement, Asked, Behavior
from rlhf_cli.labeling.judges.rates import Rate
from rlhf_cli.labeling.judges.replies import TOO_LONG

CONSISTENT = 2 / 3
"""GPT-4 was consistent on 65 % of pairs, GPT-3.5 on 46 % (Zheng et al. 2023, table 2)."""
FAR_FROM_HALF = 0.15
"""People prefer the longer answer of AlpacaEval in 62 % of pairs; what is farther from 1/2 is worth a look."""
FAILURES = 0.02
SAYS_A_LETTER = 0.5
HARDLY_AGREE = 0.6
ENOUGH = 20
"""Fewer pairs than these say nothing."""


def of_judge(name: str, asked: Asked, behavior: Behavior, known: Agreement | None) -> list[str]:
    """Findings about one judge."""
    found = []
    consistent = asked.consistent
    if _enough(consistent) and (consistent.value or 0.0) < CONSISTENT:
        wins = asked.first_shown_wins.value
        first = "" if wins is None else f" (the answer shown first wins {wins:.0%})"
        found.append(
            f"{name} gives the same verdict in both orders on {consistent.value:.0%} of pairs{first}; the others "
            "became ties: a stronger judge labels more"
        )
    found += _length(name, behavior)
    if asked.parse_failures > FAILURES * asked.questions:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in asked.failures.items() if reason != TOO_LONG)
        found.append(
            f"{name} gave no verdict on {asked.parse_failures:,} of {asked.questions:,} questions ({reasons}): look "
            "at them in votes.jsonl"
        )
    if too_long := asked.failures.get(TOO_LONG, 0):
        found.append(f"{name} cannot read {too_long:,} of {asked.questions:,} questions, which are too long for it")
    if asked.says_a_letter is not None and asked.says_a_letter < SAYS_A_LETTER:
        found.append(
            f"{name} gives the letters A and B together {asked.says_a_letter:.0%} of the probability of its next "
            "word: it hardly understands the question"
        )
    if asked.estimated:
        found.append(
            f"{name} did not say how many tokens {asked.estimated:,} of {asked.questions:,} replies took; upper bounds "
            "are counted"
        )
    return found + (_chance(name, known.rate) if known is not None else [])


def of_panel(behavior: Behavior, known: Agreement | None, between: dict[tuple[str, str], Rate]) -> list[str]:
    """Findings about several judges together."""
    found = _length("the panel", behavior) + (_chance("the panel", known.rate) if known is not None else [])
    for (one, other), rate in between.items():
        if _enough(rate) and (rate.value or 0.0) < HARDLY_AGREE:
            found.append(
                f"{one} and {other} prefer the same answer in {rate.value:.0%} of {rate.count:,} pairs, where chance "
                "gives 50%: at least one of them does not see what you mean"
            )
    return found


def _length(name: str, behavior: Behavior) -> list[str]:
    wins = behavior.longer_wins
    if not _enough(wins) or wins.value is None or abs(wins.value - 0.5) <= FAR_FROM_HALF or _holds_half(wins):
        return []
    which = "longer" if wins.value > 0.5 else "shorter"
    share = max(wins.value, 1 - wins.value)
    return [f"{name} prefers the {which} answer in {share:.0%} of {wins.count:,} pairs: see what wins in votes.jsonl"]


def _chance(name: str, rate: Rate) -> list[str]:
    if rate.value is None or rate.count < ENOUGH or not (_holds_half(rate) or rate.value < 0.5):
        return []
    than = "worse than chance" if not _holds_half(rate) else "no better than chance"
    return [f"{name} is {than} where the order is known: right on {rate}"]


def _enough(rate: Rate) -> bool:
    return rate.value is not None and rate.count >= ENOUGH


def _holds_half(rate: Rate) -> bool:
    return rate.low is not None and rate.high is not None and rate.low <= 0.5 <= rate.high
