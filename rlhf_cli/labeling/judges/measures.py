"""Measures the behavior of judges, and their agreement with a known order.

Against a known order, a tie and a pair without a verdict count 1/2.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cli.data.records import Candidates, prompt_key
from rlhf_cli.labeling.judges.panel import Ballot, Vote
from rlhf_cli.labeling.judges.rates import Rate, rounded
from rlhf_cli.labeling.judges.replies import TOO_LONG
from rlhf_cli.labeling.judges.verdicts import Verdicts, contradicted, tiers_of, verdicts_of


@dataclass(frozen=True)
class KnownOrderAgreement:
    """Agreement with known orders, over their untied pairs.

    Attributes:
        rate: share of pairs with the same order; a tie, and a pair without a verdict, counts 1/2.
        decided: the same over pairs with an untied verdict.
        longer: `rate` over pairs whose longer completion is better.
        shorter: `rate` over pairs whose shorter completion is better.
        missing: number of pairs without a verdict.
    """

    rate: Rate
    decided: Rate
    longer: Rate
    shorter: Rate
    missing: int

    @property
    def balanced(self) -> float | None:
        """Mean of `longer` and `shorter`; a judge that considers length alone gets 1/2."""
        if self.longer.value is None or self.shorter.value is None:
            return None
        return (self.longer.value + self.shorter.value) / 2

    def to_json(self) -> dict[str, Any]:
        """Convert for the report."""
        return {
            "accuracy": self.rate.to_json(),
            "accuracy_of_decided": self.decided.to_json(),
            "accuracy_where_longer_is_right": self.longer.to_json(),
            "accuracy_where_shorter_is_right": self.shorter.to_json(),
            "accuracy_balanced_by_length": rounded(self.balanced),
            "pairs_without_a_verdict": self.missing,
        }


@dataclass(frozen=True)
class _Known:
    """One untied pair with a known order; `longer` is 1 if the longer completion is better, -1 if it is worse."""

    prompt: str
    credit: float
    is_decided: bool
    is_missing: bool
    longer: int


def agreement(candidates: Sequence[Candidates], verdicts: Sequence[Verdicts]) -> KnownOrderAgreement | None:
    """Agreement of verdicts with the known orders; None if no order is known."""
    rows = list(_known_pairs(candidates, verdicts))
    if not rows:
        return None

    def rate(counts: Callable[[_Known], bool]) -> Rate:
        return Rate.of((row.prompt, row.credit, 1) for row in rows if counts(row))

    return KnownOrderAgreement(
        rate=rate(lambda row: True),
        decided=rate(lambda row: row.is_decided),
        longer=rate(lambda row: row.longer > 0),
        shorter=rate(lambda row: row.longer < 0),
        missing=sum(row.is_missing for row in rows),
    )


def _known_pairs(candidates: Sequence[Candidates], verdicts: Sequence[Verdicts]) -> Iterator[_Known]:
    for row, found in zip(candidates, verdicts, strict=True):
        for pair, right in verdicts_of(row.known).items() if row.known is not None else ():
            if right:
                said = found.get(pair)
                lengths = [len(row.completions[index]) for index in pair]
                yield _Known(
                    prompt=prompt_key(row.prompt),
                    credit=0.5 if not said else float(said == right),
                    is_decided=bool(said),
                    is_missing=said is None,
                    longer=right * ((lengths[0] > lengths[1]) - (lengths[0] < lengths[1])),
                )


def by_subset(candidates: Sequence[Candidates], verdicts: Sequence[Verdicts]) -> dict[str, KnownOrderAgreement]:
    """Agreement per subset named in the data."""
    found = {}
    for name in sorted({row.subset for row in candidates if row.subset is not None}):
        rows = [(row, said) for row, said in zip(candidates, verdicts, strict=True) if row.subset == name]
        if (of_subset := agreement([row for row, _ in rows], [said for _, said in rows])) is not None:
            found[name] = of_subset
    return found


@dataclass(frozen=True)
class VerdictStatistics:
    """Statistics of verdicts that need no known order, for one judge or the panel.

    Attributes:
        ties: share of pairs with a verdict that are ties, including inconsistent ones.
        longer_wins: share of untied pairs of different length whose longer completion wins.
        contradicted: share of untied verdicts that the ranking contradicts.
    """

    ties: Rate
    longer_wins: Rate
    contradicted: Rate

    @staticmethod
    def of(candidates: Sequence[Candidates], verdicts: Sequence[Verdicts]) -> VerdictStatistics:
        """Compute the statistics."""
        ties, longer, against = [], [], []
        for row, found in zip(candidates, verdicts, strict=True):
            prompt, lengths = prompt_key(row.prompt), [len(text) for text in row.completions]
            unequal = {
                pair: said for pair, said in found.items() if row.completions[pair[0]] != row.completions[pair[1]]
            }
            untied = [(pair, said) for pair, said in unequal.items() if said]
            unlike = [(lengths[i] - lengths[j]) * said for (i, j), said in untied if lengths[i] != lengths[j]]
            ties.append((prompt, len(unequal) - len(untied), len(unequal)))
            longer.append((prompt, sum(product > 0 for product in unlike), len(unlike)))
            against.append((prompt, contradicted(found, tiers_of(found, len(lengths))), len(untied)))
        return VerdictStatistics(Rate.of(ties), Rate.of(longer), Rate.of(against))

    def to_json(self) -> dict[str, Any]:
        """Convert for the report."""
        return {
            "ties": self.ties.to_json(),
            "longer_wins": self.longer_wins.to_json(),
            "verdicts_against_the_ranking": self.contradicted.to_json(),
        }


@dataclass(frozen=True)
class ReplyStatistics:
    """Statistics of one judge's single replies.

    Attributes:
        questions: total.
        failures: reason -> replies without a verdict.
        consistent: share of pairs asked in both orders whose two verdicts agree.
        first_shown_wins: share of untied verdicts for the completion shown first.
        says_a_letter: mean probability that a local model's next token is A or B; None for an endpoint.
        prompt_tokens: of all questions.
        completion_tokens: of all replies.
        cost: of all replies, in any run.
        estimated: replies whose endpoint reported no usage.
        fresh: replies requested in this run; the others were cached.
    """

    questions: int
    failures: dict[str, int]
    consistent: Rate
    first_shown_wins: Rate
    says_a_letter: float | None
    prompt_tokens: int
    completion_tokens: int
    cost: float
    estimated: int
    fresh: int

    @staticmethod
    def of(candidates: Sequence[Candidates], ballot: Ballot) -> ReplyStatistics:
        """Compute the statistics."""
        votes = [vote for group in ballot.votes for vote in group]
        prompts = [prompt_key(row.prompt) for row in candidates]
        chances = [vote.reply.chances for vote in votes if vote.reply.chances is not None]
        return ReplyStatistics(
            questions=len(votes),
            failures=dict(Counter(vote.failure for vote in votes if vote.failure).most_common()),
            consistent=Rate.of(_consistent(prompts[number], group) for number, group in enumerate(ballot.votes)),
            first_shown_wins=Rate.of((prompts[vote.question.item], *_first_wins(vote)) for vote in votes),
            says_a_letter=sum(map(sum, chances)) / len(chances) if chances else None,
            prompt_tokens=sum(vote.reply.prompt_tokens for vote in votes),
            completion_tokens=sum(vote.reply.completion_tokens for vote in votes),
            cost=sum(vote.reply.cost for vote in votes),
            estimated=sum(vote.reply.is_estimated for vote in votes),
            fresh=sum(not vote.is_cached for vote in votes),
        )

    @property
    def parse_failures(self) -> int:
        """Replies without a verdict; questions that were too long to be asked do not count."""
        return sum(count for reason, count in self.failures.items() if reason != TOO_LONG)

    def to_json(self) -> dict[str, Any]:
        """Convert for the report."""
        return {
            "questions": self.questions,
            "failures": self.failures,
            "swap_consistency": self.consistent.to_json(),
            "first_shown_wins": self.first_shown_wins.to_json(),
            "says_a_letter": rounded(self.says_a_letter),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost": round(self.cost, 6),
            "replies_with_estimated_cost": self.estimated,
            "replies_of_this_run": self.fresh,
        }


def _consistent(prompt: str, votes: Sequence[Vote]) -> tuple[str, int, int]:
    same = total = 0
    for a, b in itertools.combinations(votes, 2):
        shared = a.verdicts.keys() & b.verdicts.keys()  # empty unless one question is the reverse of the other
        total += len(shared)
        same += sum(a.verdicts[pair] == b.verdicts[pair] for pair in shared)
    return prompt, same, total


def _first_wins(vote: Vote) -> tuple[int, int]:
    pairs = list(itertools.combinations(vote.levels or (), 2))
    return sum(first < second for first, second in pairs), sum(first != second for first, second in pairs)


def averaged(ballot: Ballot) -> list[Verdicts] | None:
    """Verdicts of a local judge by its mean probability over both orders, which removes position bias.

    Labels do not use them: they show what an inconsistent judge knows apart from its bias. None for endpoints.
    """
    found: list[Verdicts] = []
    for group in ballot.votes:
        sums: dict[tuple[int, int], float] = {}
        for vote in group:
            if vote.reply.chances is None:
                continue
            first, second = vote.reply.chances
            i, j = vote.question.shown
            better = first / (first + second) - 0.5 if first + second else 0.0
            pair, sign = ((i, j), 1) if i < j else ((j, i), -1)
            sums[pair] = sums.get(pair, 0.0) + sign * better
        found.append({pair: (total > 0) - (total < 0) for pair, total in sums.items()})
    return found if any(found) else None


def between(first: Sequence[Verdicts], second: Sequence[Verdicts], prompts: Sequence[str]) -> Rate:
    """Share of pairs on which two judges prefer the same completion, over pairs that neither ties."""
    counts = []
    for prompt, one, other in zip(prompts, first, second, strict=True):
        both = [pair for pair in one.keys() & other.keys() if one[pair] and other[pair]]
        counts.append((prompt, sum(one[pair] == other[pair] for pair in both), len(both)))
    return Rate.of(counts)
