"""Combines the rankings of several annotators or judges: majority of pairs, Bradley-Terry, Plackett-Luce.

Each item is aggregated on its own. The result does not depend on the order of annotators or of completions.
Completions that come out equal share a tier. Hidden repeats, gold items and labels without a ranking do not count.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from rlhf_cli.data.records import Ranking, prompt_key
from rlhf_cli.errors import DataError, UsageError
from rlhf_cli.labeling.label_records import LabelRecord
from rlhf_cli.progress import task

Method = Literal["individual", "majority", "bradley-terry", "plackett-luce"]
METHODS: tuple[Method, ...] = get_args(Method)
Tiers = tuple[tuple[int, ...], ...]
Levels = Sequence[int]
"""(K,) tier of each completion, 0 is best."""

PRIOR = 0.1
"""Weight of the sum of squared strengths added to the negative log-likelihood. It keeps the strength of a completion
finite that wins every comparison."""
TOLERANCE = 0.01
"""Consecutive strengths (log-odds) that differ by at most this much share a tier; it is a win rate of 50.25 %."""


@dataclass(frozen=True)
class _Vote:
    item: str
    annotator: str | None
    at: str
    ranking: Ranking


def group_of(ranking: Ranking) -> str:
    """Hash of a prompt and its completions, independent of the annotator and of the order of completions."""
    texts = [prompt_key(ranking.prompt), *sorted(ranking.completions)]
    lengths = "".join(f"{len(text)}:{text}" for text in texts)
    return hashlib.sha256(lengths.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def aggregate(labels: Sequence[LabelRecord], method: Method) -> list[Ranking]:
    """Return the rankings to train on: all of them, or one per item, in the order in which items first appear.

    If an annotator labeled an item twice, the later label counts. An aggregated ranking has no annotator. For two
    completions it has the mean margin, negated where an annotator preferred the other completion, and at least 0,
    provided that all labels have a margin.

    Args:
        labels: all labels; labels without a ranking, hidden repeats and gold items are ignored.
        method: "individual" keeps all rankings; see `majority`, `bradley_terry` and `plackett_luce` for the others.

    Raises:
        UsageError: the method needs a package that is not installed.
        DataError: labels of one item have different completions.
    """
    usable = [label for label in labels if label.outcome == "ranked" and label.purpose == "label"]
    if method == "individual":
        return [label.ranking() for label in usable]
    return _aggregated([_Vote(label.item, label.annotator, label.at, label.ranking()) for label in usable], method)


def aggregate_rankings(rankings: Sequence[Ranking], method: Method) -> list[Ranking]:
    """Like `aggregate`, for rankings from a file: rankings of the same completions belong to one item.

    Each ranking without an annotator counts as one of its own annotator.
    """
    if method == "individual":
        return list(rankings)
    return _aggregated([_Vote(group_of(ranking), ranking.annotator, "", ranking) for ranking in rankings], method)


def check_installed(method: Method) -> None:
    """Raise `UsageError` if the method needs a package that is not installed. Call this before labeling begins."""
    if method in ("bradley-terry", "plackett-luce"):
        _choix(method)


def _aggregated(votes: Sequence[_Vote], method: Method) -> list[Ranking]:
    check_installed(method)
    methods: dict[str, Callable[[Sequence[Levels]], Tiers]] = {
        "bradley-terry": bradley_terry,
        "plackett-luce": plackett_luce,
    }
    items: dict[str, list[_Vote]] = {}
    for vote in votes:
        items.setdefault(vote.item, []).append(vote)
    if method == "majority":
        return [_one(_latest(group), majority) for group in items.values()]
    aggregated = []
    with task("aggregating labels", len(items), "items", saves=False) as bar:  # about 100 items per second
        for group in items.values():
            aggregated.append(_one(_latest(group), methods[method]))
            bar.advance()
    return aggregated


def _latest(votes: Sequence[_Vote]) -> list[_Vote]:
    """Without labels that their own annotator replaced."""
    last: dict[object, tuple[str, int]] = {}
    for number, vote in enumerate(votes):
        who = number if vote.annotator is None else vote.annotator
        last[who] = max(last.get(who, ("", -1)), (vote.at, number))
    return [votes[number] for number in sorted(number for _, number in last.values())]


def _one(votes: Sequence[_Vote], combine: Callable[[Sequence[Levels]], Tiers]) -> Ranking:
    first = votes[0].ranking
    levels = [in_order_of(first, vote.ranking).levels() for vote in votes]
    tiers = combine(levels)
    margin = None
    if len(first.completions) == 2 and len(tiers) == 2:
        margin = _mean_margin(tiers, levels, [vote.ranking.margin for vote in votes])
    return replace(first, tiers=tiers, margin=margin, annotator=None)


def in_order_of(first: Ranking, other: Ranking) -> Ranking:
    """Reorder a ranking's completions as in `first`; raises `DataError` if they are different ones."""
    if other.completions == first.completions:
        return other
    if Counter(first.completions) != Counter(other.completions):
        raise DataError(
            f"two labels of the same item have different completions: {first.completions[0][:60]!r} and others, "
            f"{other.completions[0][:60]!r} and others",
            hint="the file was edited, or labels of two runs were concatenated; export them again",
        )
    positions: dict[str, list[int]] = {}
    for index, completion in enumerate(first.completions):
        positions.setdefault(completion, []).append(index)
    position = [positions[completion].pop(0) for completion in other.completions]
    tiers = tuple(tuple(position[index] for index in tier) for tier in other.tiers)
    return replace(other, completions=first.completions, tiers=tiers)


def _mean_margin(tiers: Tiers, levels: Sequence[Levels], margins: Sequence[float | None]) -> float | None:
    (better,), (worse,) = tiers
    total = 0.0
    for level, margin in zip(levels, margins, strict=True):
        if level[better] == level[worse]:
            continue
        if margin is None:
            return None
        total += margin if level[better] < level[worse] else -margin
    return max(0.0, total / len(levels))


# Methods


def majority(levels: Sequence[Levels]) -> Tiers:
    """Rank by Copeland's score: the pairs a completion wins by majority, a draw counting 1/2.

    A tie is half a vote for either completion. If the majorities form an order, the result is that order. In a cycle
    (a > b > c > a), completions with equal scores share a tier.

    Args:
        levels: (A, K), of A annotators.
    """
    count = len(levels[0])
    scores = [0] * count
    for one, other in itertools.combinations(range(count), 2):
        lead = sum((level[one] < level[other]) - (level[one] > level[other]) for level in levels)
        scores[one] += (lead > 0) - (lead < 0)
        scores[other] += (lead < 0) - (lead > 0)
    return _tiers(scores, tolerance=0)


def bradley_terry(levels: Sequence[Levels]) -> Tiers:
    """Rank by `bradley_terry_strengths` of (A, K) levels of A annotators; see `TOLERANCE` for ties."""
    return _tiers(bradley_terry_strengths(levels), TOLERANCE)


def bradley_terry_strengths(levels: Sequence[Levels]) -> list[float]:
    """(K,) strengths s that fit all pairs best: P(i better than j) = 1 / (1 + exp(s_j - s_i)).

    A tie is half a win for each (Bradley and Terry 1952; fitted by `choix.opt_pairwise`, with `PRIOR`).

    Args:
        levels: (A, K), of A annotators.
    """
    choix = _choix("bradley-terry")
    wins: Counter[tuple[int, int]] = Counter()  # in halves
    for level in levels:
        for one, other in itertools.permutations(range(len(level)), 2):
            wins[one, other] += 2 * (level[one] < level[other]) + (level[one] == level[other])
    halves = [pair for pair in sorted(wins) for _ in range(wins[pair])]
    # Each comparison is counted twice, so the prior is doubled too: the optimum is unchanged.
    return choix.opt_pairwise(len(levels[0]), halves, alpha=2 * PRIOR, tol=1e-9).tolist()


def plackett_luce(levels: Sequence[Levels]) -> Tiers:
    """Rank by `plackett_luce_strengths` of (A, K) levels of A annotators; see `TOLERANCE` for ties."""
    return _tiers(plackett_luce_strengths(levels), TOLERANCE)


def plackett_luce_strengths(levels: Sequence[Levels]) -> list[float]:
    """(K,) strengths s that fit the rankings best: choose the best of all, then the best of the rest, and so on.

    P(i chosen from S) = exp(s_i) / sum over S of exp(s_j) (Plackett 1975; fitted by `choix.opt_top1`, with `PRIOR`).
    In a tie every completion is chosen once, from the tie and everything below it (Breslow's method).

    Args:
        levels: (A, K), of A annotators.
    """
    choix = _choix("plackett-luce")
    choices: Counter[tuple[int, tuple[int, ...]]] = Counter()
    for level in levels:
        for chosen, own in enumerate(level):
            rest = tuple(index for index, its in enumerate(level) if its >= own and index != chosen)
            if rest:
                choices[chosen, rest] += 1
    data = [(chosen, rest) for chosen, rest in sorted(choices) for _ in range(choices[chosen, rest])]
    return choix.opt_top1(len(levels[0]), data, alpha=PRIOR, tol=1e-9).tolist()


def _tiers(scores: Sequence[float], tolerance: float) -> Tiers:
    """Tiers by score, highest first; a tier ends where the next score is lower by more than `tolerance`."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    tiers = [[order[0]]]
    for before, index in itertools.pairwise(order):
        if scores[before] - scores[index] > tolerance:
            tiers.append([])
        tiers[-1].append(index)
    return tuple(tuple(sorted(tier)) for tier in tiers)


def _choix(method: str):
    try:
        import choix
    except ImportError as error:
        raise UsageError(
            f"aggregation by `{method}` needs the package `choix`, which is not installed",
            hint="`pip install 'rlhf-cli[merge]'`, or use `majority`",
        ) from error
    return choix
