"""Combines verdicts: both orders into one verdict per pair, pairs into tiers, judges into a panel.

A verdict about a pair (i, j) of completions, i < j, is +1 if i is better, -1 if j is better, 0 for a tie. A pair that
is missing has no verdict.

Tiers come from points: a win is 1, a tie or a missing verdict 1/2 (Copeland 1951; Rubinstein 1980, "Ranking the
participants in a tournament"). If the verdicts form an order with ties, the result is that order. Completions in a
cycle (a > b > c > a) that nothing else distinguishes get equal points and share a tier. Where points and a single
verdict disagree, points decide.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

from rlhf_cli.labeling.judges.replies import Levels

Pair = tuple[int, int]
Verdicts = dict[Pair, int]
Tiers = tuple[tuple[int, ...], ...]


def pairs_of(count: int) -> list[Pair]:
    """All pairs of `count` completions."""
    return list(itertools.combinations(range(count), 2))


def verdicts_in(shown: Sequence[int], levels: Levels) -> Verdicts:
    """Verdicts of one reply.

    Args:
        shown: (N,) completions in the order shown.
        levels: (N,) tier of each, 0 is best.
    """
    found: Verdicts = {}
    for (first, a), (second, b) in itertools.combinations(zip(shown, levels, strict=True), 2):
        better = (b > a) - (b < a)
        found[min(first, second), max(first, second)] = better if first < second else -better
    return found


def both_ways(replies: Sequence[tuple[Sequence[int], Verdicts]]) -> Verdicts:
    """One verdict per pair from all questions about it: a tie if they differ; none if one is missing.

    Args:
        replies: completions that a question showed, and the verdicts of its reply; none after a failure.
    """
    asked: dict[Pair, list[int | None]] = {}
    for shown, verdicts in replies:
        for pair in itertools.combinations(sorted(shown), 2):
            asked.setdefault(pair, []).append(verdicts.get(pair))
    found: Verdicts = {}
    for pair, given in asked.items():
        said = [one for one in given if one is not None]
        if len(said) == len(given):
            found[pair] = said[0] if len(set(said)) == 1 else 0
    return found


def majority(judges: Sequence[Verdicts]) -> Verdicts:
    """Majority verdict per pair; a draw between two outcomes is a tie. Judges without a verdict do not vote."""
    found: Verdicts = {}
    for pair in set().union(*judges):
        votes = Counter(judge[pair] for judge in judges if pair in judge)
        (outcome, most), *others = votes.most_common()
        found[pair] = 0 if any(count == most for _, count in others) else outcome
    return found


def equal_completions(completions: Sequence[str]) -> Verdicts:
    """Ties between completions with the same text, which are never compared."""
    return {(i, j): 0 for i, j in pairs_of(len(completions)) if completions[i] == completions[j]}


def spread(verdicts: Mapping[Pair, int], completions: Sequence[str]) -> Verdicts:
    """Extend verdicts on distinct texts to all completions with these texts; equal completions tie."""
    first = {text: index for index, text in reversed(list(enumerate(completions)))}
    found = equal_completions(completions)
    for i, j in pairs_of(len(completions)):
        a, b = first[completions[i]], first[completions[j]]
        if a < b and (a, b) in verdicts:
            found[i, j] = verdicts[a, b]
        elif b < a and (b, a) in verdicts:
            found[i, j] = -verdicts[b, a]
    return found


def points(verdicts: Mapping[Pair, int], count: int) -> list[float]:
    """Points of each completion: (K,) multiples of 1/2."""
    found = [0.0] * count
    for i, j in pairs_of(count):
        outcome = verdicts.get((i, j), 0)
        found[i] += (1 + outcome) / 2
        found[j] += (1 - outcome) / 2
    return found


def tiers_of(verdicts: Mapping[Pair, int], count: int) -> Tiers:
    """Rank completions by points, best first; equal points share a tier."""
    found = points(verdicts, count)
    return tuple(
        tuple(index for index in range(count) if found[index] == value) for value in sorted(set(found), reverse=True)
    )


def contradicted(verdicts: Mapping[Pair, int], tiers: Tiers) -> int:
    """Number of untied verdicts that the tiers contradict: they are part of a cycle, or overruled by points."""
    level = {index: tier for tier, members in enumerate(tiers) for index in members}
    return sum(outcome * (level[j] - level[i]) <= 0 for (i, j), outcome in verdicts.items() if outcome)


def verdicts_of(tiers: Tiers) -> Verdicts:
    """Verdicts that a ranking implies."""
    level = {index: tier for tier, members in enumerate(tiers) for index in members}
    return {(i, j): (level[j] > level[i]) - (level[j] < level[i]) for i, j in pairs_of(len(level))}
