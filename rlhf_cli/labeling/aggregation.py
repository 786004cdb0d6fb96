"""One ranking an item out of several people's or judges': majority of pairs, Bradley-Terry, Plackett-Luce.

Every way looks at an item alone and treats annotators alike: their order, and that of the answers, changes nothing.
Answers that come out equal share a tier. Hidden repeats, gold items and labels without a ranking do not count.
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

How = Literal["individual", "majority", "bradley-terry", "plackett-luce"]
WAYS: tuple[How, ...] = get_args(How)
Tiers = tuple[tuple[int, ...], ...]
Levels = Sequence[int]
"""(K,) tier of each answer, 0 the best."""

PRIOR = 0.1
"""Weight of the sum of squared strengths that is added to the negative log-likelihood: strengths stay finite where an
answer won every comparison."""
TOLERANCE = 0.01
"""Strengths (log-odds) that follow each other this closely or closer share a tier; it is a win rate of 50.25 %."""


@dataclass(frozen=True)
class _Vote:
    item: str
    annotator: str | None
    at: str
    ranking: Ranking


def group_of(ranking: Ranking) -> str:
    """The same for all rankings of the same answers to the same prompt, whoever gave them and in whatever order."""
    texts = [prompt_key(ranking.prompt), *sorted(ranking.completions)]
    lengths = "".join(f"{len(text)}:{text}" for text in texts)
    return hashlib.sha256(lengths.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def merge(labels: Sequence[LabelRecord], how: How) -> list[Ranking]:
    """Rankings to learn from: everyone's, or one an item, in the order in which items first appear.

    Of two labels of an item by one annotator the latest counts. A merged ranking has no annotator; of two answers it
    has the mean of the margins, with a minus where the other answer won, and never below 0, if all gave one.

    Args:
        labels: all labels; those that are no rankings, and repeats and gold items, are passed over.
        how: "individual" keeps all; the others are `majority`, `bradley_terry` and `plackett_luce`.

    Raises:
        UsageError: `how` needs a package that is not installed.
        DataError: labels of one item are of different answers.
    """
    usable = [label for label in labels if label.outcome == "ranked" and label.purpose == "label"]
    if how == "individual":
        return [label.ranking() for label in usable]
    return _merged([_Vote(label.item, label.annotator, label.at, label.ranking()) for label in usable], how)


def merge_rankings(rankings: Sequence[Ranking], how: How) -> list[Ranking]:
    """As `merge`, of rankings as a file has them: those of the same answers are of one item.

    Rankings without an annotator count as one of somebody else each.
    """
    if how == "individual":
        return list(rankings)
    return _merged([_Vote(group_of(ranking), ranking.annotator, "", ranking) for ranking in rankings], how)


def require(how: How) -> None:
    """Raise `UsageError` now, not after the labeling, where merging so needs a package that is not installed."""
    if how in ("bradley-terry", "plackett-luce"):
        _choix(how)


def _merged(votes: Sequence[_Vote], how: How) -> list[Ranking]:
    require(how)
    ways: dict[str, Callable[[Sequence[Levels]], Tiers]] = {
        "bradley-terry": bradley_terry,
        "plackett-luce": plackett_luce,
    }
    items: dict[str, list[_Vote]] = {}
    for vote in votes:
        items.setdefault(vote.item, []).append(vote)
    if how == "majority":
        return [_one(_latest(group), majority) for group in items.values()]
    merged = []
    with task("merging labels", len(items), "items") as bar:  # a hundred a second
        for group in items.values():
            merged.append(_one(_latest(group), ways[how]))
            bar.advance()
    return merged


def _latest(votes: Sequence[_Vote]) -> list[_Vote]:
    """Without those that their own annotator replaced."""
    last: dict[object, tuple[str, int]] = {}
    for number, vote in enumerate(votes):
        who = number if vote.annotator is None else vote.annotator
        last[who] = max(last.get(who, ("", -1)), (vote.at, number))
    return [votes[number] for number in sorted(number for _, number in last.values())]


def _one(votes: Sequence[_Vote], way: Callable[[Sequence[Levels]], Tiers]) -> Ranking:
    first = votes[0].ranking
    levels = [in_order_of(first, vote.ranking).levels() for vote in votes]
    tiers = way(levels)
    margin = None
    if len(first.completions) == 2 and len(tiers) == 2:
        margin = _mean_margin(tiers, levels, [vote.ranking.margin for vote in votes])
    return replace(first, tiers=tiers, margin=margin, annotator=None)


def in_order_of(first: Ranking, other: Ranking) -> Ranking:
    """A ranking of the same answers with these in the order of `first`; raises `DataError` where they are others."""
    if other.completions == first.completions:
        return other
    if Counter(first.completions) != Counter(other.completions):
        raise DataError(
            f"two labels of the same item are of different answers: {first.completions[0][:60]!r} and others, "
            f"{other.completions[0][:60]!r} and others",
            hint="the file was changed by hand, or labels of two runs were joined; export them once more",
        )
    places: dict[str, list[int]] = {}
    for index, completion in enumerate(first.completions):
        places.setdefault(completion, []).append(index)
    place = [places[completion].pop(0) for completion in other.completions]
    tiers = tuple(tuple(place[index] for index in tier) for tier in other.tiers)
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


# The three ways


def majority(levels: Sequence[Levels]) -> Tiers:
    """Order by Copeland's score: pairs that an answer wins by majority, an even one counting 1/2.

    A tie is half a vote for either answer. Where the majorities form an order, this is that order. Where they go round
    in a circle (a > b > c > a), answers of equal score share a tier.

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
    """Order by `bradley_terry_strengths` of (A, K) levels of A annotators; within `TOLERANCE` they share a tier."""
    return _tiers(bradley_terry_strengths(levels), TOLERANCE)


def bradley_terry_strengths(levels: Sequence[Levels]) -> list[float]:
    """(K,) strengths s that best explain all pairs: P(i better than j) = 1 / (1 + exp(s_j - s_i)).

    A tie is half a win for either (Bradley and Terry 1952; the fit is `choix.opt_pairwise`, with `PRIOR`).

    Args:
        levels: (A, K), of A annotators.
    """
    choix = _choix("bradley-terry")
    wins: Counter[tuple[int, int]] = Counter()  # in halves
    for level in levels:
        for one, other in itertools.permutations(range(len(level)), 2):
            wins[one, other] += 2 * (level[one] < level[other]) + (level[one] == level[other])
    halves = [pair for pair in sorted(wins) for _ in range(wins[pair])]
    # Each comparison is there twice, so the prior is too: the optimum is that of whole comparisons.
    return choix.opt_pairwise(len(levels[0]), halves, alpha=2 * PRIOR, tol=1e-9).tolist()


def plackett_luce(levels: Sequence[Levels]) -> Tiers:
    """Order by `plackett_luce_strengths` of (A, K) levels of A annotators; within `TOLERANCE` they share a tier."""
    return _tiers(plackett_luce_strengths(levels), TOLERANCE)


def plackett_luce_strengths(levels: Sequence[Levels]) -> list[float]:
    """(K,) strengths s that best explain choices: the best of all, then the best of the rest, and so on.

    P(i chosen from S) = exp(s_i) / sum over S of exp(s_j) (Plackett 1975; the fit is `choix.opt_top1`, with `PRIOR`).
    Of a tie every answer is chosen once, from the tie and all below it (Breslow's way, exact where there are none).

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


def _choix(how: str):
    try:
        import choix
    except ImportError as error:
        raise UsageError(
            f"merging labels by `{how}` needs the package `choix`, which is not installed",
            hint="`pip install 'rlhf-cli[merge]'`, or merge by `majority`",
        ) from error
    return choix
