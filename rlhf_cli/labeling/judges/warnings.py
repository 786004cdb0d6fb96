"""Warnings about judges: each gives a measured value and says what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rlhf_cli.labeling.judges.measures import KnownOrderAgreement, ReplyStatistics, VerdictStatistics
from rlhf_cli.labeling.judges.rates import Rate
from rlhf_cli.labeling.judges.replies import TOO_LONG
from rlhf_cli.labeling.warnings import LabelWarning

CONSISTENT = 2 / 3
"""GPT-4 was consistent on 65 % of pairs, GPT-3.5 on 46 % (Zheng et al. 2023, table 2)."""
FAR_FROM_HALF = 0.15
"""People prefer the longer completion of AlpacaEval in 62 % of pairs; a larger distance from 1/2 is reported."""
FAILURES = 0.02
SAYS_A_LETTER = 0.5
HARDLY_AGREE = 0.6
ENOUGH = 20
"""Fewer pairs than this are not judged."""
PANEL = "the panel"


def warnings_of_judge(
    name: str, replies: ReplyStatistics, verdicts: VerdictStatistics, known: KnownOrderAgreement | None
) -> Iterator[LabelWarning]:
    """Warnings about one judge."""
    consistent = replies.consistent
    if _enough(consistent) and (consistent.value or 0.0) < CONSISTENT:
        wins = replies.first_shown_wins.value
        first = "" if wins is None else f" (the completion shown first wins {wins:.0%})"
        yield LabelWarning(
            "consistency",
            name,
            f"gives the same verdict in both orders on {consistent.value:.0%} of pairs{first}; the others are ties",
            "use a stronger judge: it labels more pairs",
            is_doubt=False,
        )
    yield from _length(name, verdicts)
    yield from _failures(name, replies)
    if replies.says_a_letter is not None and replies.says_a_letter < SAYS_A_LETTER:
        yield LabelWarning(
            "format",
            name,
            f"gives the letters A and B together {replies.says_a_letter:.0%} of the probability of its next token",
            "it hardly understands the question: use another judge",
            is_doubt=True,
        )
    if replies.estimated:
        yield LabelWarning(
            "usage",
            name,
            f"did not report the tokens of {replies.estimated:,} of {replies.questions:,} replies",
            "upper bounds are counted as their cost",
            is_doubt=False,
        )
    yield from _chance(name, known)


def warnings_of_panel(
    verdicts: VerdictStatistics, known: KnownOrderAgreement | None, between: Mapping[tuple[str, str], Rate]
) -> Iterator[LabelWarning]:
    """Warnings about several judges together."""
    yield from _length(PANEL, verdicts)
    yield from _chance(PANEL, known)
    for (one, other), rate in between.items():
        if _enough(rate) and (rate.value or 0.0) < HARDLY_AGREE:
            yield LabelWarning(
                "disagreement",
                f"{one} and {other}",
                f"prefer the same completion in {rate.value:.0%} of {rate.count:,} pairs; chance gives 50%",
                "at least one of them does not follow the rubric: compare their votes in votes.jsonl",
                is_doubt=True,
            )


def _failures(name: str, replies: ReplyStatistics) -> Iterator[LabelWarning]:
    if replies.parse_failures > FAILURES * replies.questions:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in replies.failures.items() if reason != TOO_LONG)
        yield LabelWarning(
            "failures",
            name,
            f"gave no verdict on {replies.parse_failures:,} of {replies.questions:,} questions ({reasons})",
            "read these replies in votes.jsonl",
            is_doubt=False,
        )
    if too_long := replies.failures.get(TOO_LONG, 0):
        yield LabelWarning(
            "context",
            name,
            f"cannot read {too_long:,} of {replies.questions:,} questions, which exceed its context length",
            "use a judge with a longer context",
            is_doubt=False,
        )


def _length(name: str, verdicts: VerdictStatistics) -> Iterator[LabelWarning]:
    wins = verdicts.longer_wins
    if not _enough(wins) or wins.value is None or abs(wins.value - 0.5) <= FAR_FROM_HALF or _includes_half(wins):
        return
    which = "longer" if wins.value > 0.5 else "shorter"
    yield LabelWarning(
        "length",
        name,
        f"prefers the {which} completion in {max(wins.value, 1 - wins.value):.0%} of {wins.count:,} pairs",
        "read which completions win in votes.jsonl",
        is_doubt=True,
    )


def _chance(name: str, known: KnownOrderAgreement | None) -> Iterator[LabelWarning]:
    if known is None or known.rate.value is None or known.rate.count < ENOUGH:
        return
    if _includes_half(known.rate) or known.rate.value < 0.5:
        than = "no better than chance" if _includes_half(known.rate) else "worse than chance"
        yield LabelWarning(
            "accuracy",
            name,
            f"is {than} on pairs with a known order: correct on {known.rate}",
            "do not train on its labels; use another judge or rubric",
            is_doubt=True,
        )


def _enough(rate: Rate) -> bool:
    return rate.value is not None and rate.count >= ENOUGH


def _includes_half(rate: Rate) -> bool:
    return rate.low is not None and rate.high is not None and rate.low <= 0.5 <= rate.high
