"""From verdicts to rankings: both orders to one verdict a pair, pairs to tiers, judges to a panel.

A verdict about a pair (i, j) of answers, i < j, is +1 where i is better, -1 where j is, 0 for a tie; a pair that is
missing has no verdict.

Tiers come from points: a win is 1, a tie or a missing verdict 1/2 (Copeland 1951; Rubinstein 1980, "Ranking the
participants in a tournament"). Where the verdicts are an order with ties, that order comes out. Answers in a cycle that
nothing else tells apart (a beats b beats c beats a) have equal points and share a tier; where points and a single
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
    """All pairs of `count` answers."""
    return list(itertools.combinations(range(count), 2))


def verdicts_in(shown: Sequence[int], levels: Levels) -> Verdicts:
    """The verdicts of one reply.

    Args:
        shown: (N,) answers as they were shown.
        levels: (N,) tier of each, 0 the best.
    """
    found: Verdicts = {}
    for (first, a), (second, b) in itertools.combinations(zip(shown, levels, strict=True), 2):
        better = (b > a) - (b < a)
        found[min(first, second), max(first, second)] = better if first < second else -better
    return found


def both_ways(replies: Sequence[tuple[Sequence[int], Verdicts]]) -> Verdicts:
    """One verdict a pair from those of all questions about it: theirs if they agree, else a tie; none if one lacks.

    Args:
        replies: which answers a question showed, and the verdicts in its reply; nothing where it failed.
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
    """What most judges say of each pair; a draw between two outcomes is a tie. Judges without a verdict do not vote."""
    found: Verdicts = {}
    for pair in set().union(*judges):
        votes = Counter(judge[pair] for judge in judges if pair in judge)
        (outcome, most), *others = votes.most_common()
        found[pair] = 0 if any(count == most for _, count in others) else outcome
    return found


def equal_answers(completions: Sequence[str]) -> Verdicts:
    """Ties of answers that are the same text, which nobody is asked about."""
    return {(i, j): 0 for i, j in pairs_of(len(completions)) if completions[i] == completions[j]}


def spread(verdicts: Mapping[Pair, int], completions: Sequence[str]) -> Verdicts:
    """Verdicts on distinct texts, said of all answers that are these texts; equal answers tie."""
    first = {text: index for index, text in reversed(list(enumerate(completions)))}
    found = equal_answers(completions)
    for i, j in pairs_of(len(completions)):
        a, b = first[completions[i]], first[completions[j]]
        if a < b and (a, b) in verdicts:
            found[i, j] = verdicts[a, b]
        elif b < a and (b, a) in verdicts:
            found[i, j] = -verdicts[b, a]
    return found


def points(verdicts: Mapping[Pair, int], count: int) -> list[float]:
    """Points of each answer: (K,) multiples of 1/2."""
    found = [0.0] * count
    for i, j in pairs_of(count):
        outcome = verdicts.get((i, j), 0)
        found[i] += (1 + outcome) / 2
        found[j] += (1 - outcome) / 2
    return found


def tiers_of(verdicts: Mapping[Pair, int], count: int) -> Tiers:
    """Answers by points, best first; equal points share a tier."""
    found = points(verdicts, count)
    return tuple(
        tuple(index for index in range(count) if found[index] == value) for value in sorted(set(found), reverse=True)
    )


def contradicted(verdicts: Mapping[Pair, int], tiers: Tiers) -> int:
    """Untied verdicts that the tiers do not follow, since they are part of a cycle or stand against the points."""
    level = {index: tier for tier, members in enumerate(tiers) for index in members}
    return sum(outcome * (level[j] - level[i]) <= 0 for (i, j), outcome in verdicts.items() if outcome)


def verdicts_of(tiers: Tiers) -> Verdicts:
    """The verdicts that a ranking holds."""
    level = {index: tier for tier, members in enumerate(tiers) for index in members}
    return {(i, j): (level[j] > level[i]) - (level[j] < level[i]) for i, j in pairs_of(len(level))}
