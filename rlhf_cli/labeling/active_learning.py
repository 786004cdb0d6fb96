"""Active learning: selects the prompts and completions to label, based on the preferences of reward models.

A reward model prefers one completion over another with p = sigmoid(r_i - r_j) (Bradley and Terry 1952), where the
rewards are on the scale the model was trained on. Scaled rewards would give the same ranking but other preferences.

`uncertainty` is uncertainty sampling (Lewis and Gale 1994): the entropy of p in bits, largest at p = 1/2; for one pair
it is equivalent to the smallest margin. `disagreement` is the standard deviation of p over an ensemble (Christiano et
al. 2017, section 2.2.4, who use the variance). Neither is guaranteed to help: Christiano et al. saw tasks where it
hurt, and Gleave and Irving (2022, arXiv:2203.07472) found that ensembles of language reward models did no better than
random selection. A pair of equally good completions stays uncertain forever, and its label teaches little; an ensemble
can agree on that, one model cannot. Prompts are scored independently: the best of them may all teach the same thing.

Held-out prompts, which measure the accuracy of a reward model, are always selected at random. Otherwise a reward model
would be measured on the pairs it finds hardest, and its accuracy could not be compared with any other.

The result does not depend on the order of prompts, or of a prompt's completions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Strategy = Literal["random", "uncertainty", "disagreement"]

_MOST_SUBSETS = 1_000
"""All subsets of k of K completions are tried up to this many; 12 completions or fewer never have more."""


@dataclass(frozen=True)
class Item:
    """A prompt with the completions that could be labeled.

    Attributes:
        key: hash of the prompt, such as `prompt_key`.
        completions: K texts; some may be equal.
        is_held_out: the prompt measures reward models.
        rewards: (M, K) of M models, each on the scale it was trained on; None if not needed: for held-out prompts, and
            for `random`.
    """

    key: str
    completions: tuple[str, ...]
    is_held_out: bool = False
    rewards: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class SelectedItem:
    """A prompt to label.

    Attributes:
        item: index of the prompt.
        completions: indices of the completions to label, ascending.
        is_held_out: selected at random, for any strategy.
        score: mean over the pairs of these completions, in bits (uncertainty) or as a standard deviation
            (disagreement); None if selected at random.
        rank: 1 is the highest score; None without a score.
    """

    item: int
    completions: tuple[int, ...]
    is_held_out: bool
    score: float | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Selection:
    """The prompts selected, and the rest.

    Attributes:
        selected: in the order of the items.
        not_selected: scores of the items that were scored but not selected, highest first.
        identical: indices of the items that cannot be labeled, because all their completions have the same text.
    """

    selected: list[SelectedItem]
    not_selected: list[float]
    identical: list[int]


def select(items: Sequence[Item], *, by: Strategy, prompts: int, completions: int | None, seed: int) -> Selection:
    """Select prompts, and the completions of each.

    A prompt's score is the mean over the pairs that would be labeled, not the maximum: a ranking of K completions
    labels all C(K, 2) pairs, and one of many pairs is almost always near 1/2, so the maximum hardly distinguishes
    prompts. If a prompt has more than `completions` completions, the subset with the highest pair scores is used: exact
    for up to 1,000 subsets, otherwise greedy from the best pair. Completions with equal text count once: their p is
    always 1/2. Ties are broken by the seed.

    Held-out prompts keep their share of the prompts, rounded to the nearest whole number and with at least one prompt
    on each side. They and their completions are selected at random, identically for every strategy.

    Args:
        items: N.
        by: strategy.
        prompts: number of prompts to select, or all if there are fewer.
            completions: per prompt, 2 or more; None keeps all, including equal ones.
            seed: of random selection.

    Raises:
        ValueError: rewards of an item are missing, have the wrong shape, or are not finite.
    """
    identical = [number for number, item in enumerate(items) if len(set(item.completions)) < 2]
    usable = sorted(set(range(len(items))) - set(identical))
    train, held_out = _in_random_order(items, usable, seed)
    held_out_count = held_out_share(len(train), len(held_out), prompts)
    drawn = held_out[:held_out_count]
    if by == "random":
        drawn += train[: prompts - held_out_count]
        train = []
    selected = [
        SelectedItem(number, _random_completions(items[number], completions, seed), items[number].is_held_out)
        for number in drawn
    ]
    scored = [(number, *_best_completions(items[number], by, completions, seed)) for number in train]
    scored.sort(key=lambda row: -row[2])  # stable: equal scores stay in the order of the seed
    count = prompts - held_out_count
    selected += [SelectedItem(row[0], row[1], False, row[2], rank) for rank, row in enumerate(scored[:count], start=1)]
    return Selection(sorted(selected, key=lambda one: one.item), [row[2] for row in scored[count:]], identical)


def select_prompts(items: Sequence[Item], *, prompts: int, seed: int) -> list[int]:
    """Select prompts at random before they have completions, ascending.

    These are those that `select` takes by `random`, unless the completions of some turn out to be all equal: `select`
    takes others in their place.

    Args:
        items: N, without completions.
        prompts: number of prompts to select, or all if there are fewer.
        seed: of the selection.
    """
    train, held_out = _in_random_order(items, range(len(items)), seed)
    count = held_out_share(len(train), len(held_out), prompts)
    return sorted(held_out[:count] + train[: prompts - count])


def _in_random_order(items: Sequence[Item], numbers: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Training prompts and held-out prompts of these numbers, each in the order of the seed."""
    order = sorted(numbers, key=lambda number: _position(items[number], seed))
    train = [number for number in order if not items[number].is_held_out]
    return train, [number for number in order if items[number].is_held_out]


def held_out_share(train: int, held_out: int, prompts: int) -> int:
    """Number of held-out prompts among `prompts`.

    Args:
        train: available prompts for training.
        held_out: available held-out prompts.
        prompts: number to select.
    """
    prompts = min(prompts, train + held_out)
    if not held_out or not train or prompts < 2:
        # A single prompt is for training: without training there is nothing to measure.
        return min(held_out, max(0, prompts - train))
    nearest = (2 * prompts * held_out + train + held_out) // (2 * (train + held_out))
    least, most = max(1, prompts - train), min(held_out, prompts - 1)
    return min(max(nearest, least), most)


def preferences(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """Preference p of completion i over j under each model, sigmoid(r_i - r_j): (M, K) to (M, K, K)."""
    # Written as tanh, it does not overflow for any difference.
    return 0.5 * (1.0 + np.tanh(0.5 * (rewards[:, :, np.newaxis] - rewards[:, np.newaxis, :])))


def pair_scores(rewards: NDArray[np.float64], by: Literal["uncertainty", "disagreement"]) -> NDArray[np.float64]:
    """Expected value of labeling each pair of completions.

    Args:
        rewards: (M, K); `uncertainty` uses the mean preference of the models, usually a single one.
        by: strategy.

    Returns:
        (K, K), symmetric, with a diagonal of 0.
    """
    p = preferences(rewards)
    if by == "disagreement":
        scores = p.std(axis=0)
    else:
        p = p.mean(axis=0)
        scores = _bits(p) + _bits(1.0 - p)
    scores = (scores + scores.T) / 2  # symmetric up to the last bit
    np.fill_diagonal(scores, 0.0)
    return scores


def best_subset(scores: NDArray[np.float64], count: int) -> tuple[int, ...]:
    """The `count` completions with the highest sum of pair scores: exact up to 1,000 subsets, otherwise greedy.

    Args:
        scores: (K, K), symmetric, with a diagonal of 0.
        count: 2 to K.
    """
    size = len(scores)
    if comb(size, count) <= _MOST_SUBSETS:
        subsets = _subsets(size, count)
        totals = scores[subsets[:, :, np.newaxis], subsets[:, np.newaxis, :]].sum(axis=(1, 2))
        return tuple(subsets[int(totals.argmax())].tolist())
    pairs = scores - np.diag(np.full(size, np.inf))  # never selects a completion twice, even if all scores are 0
    taken = [int(number) for number in np.unravel_index(int(pairs.argmax()), pairs.shape)]
    while len(taken) < count:
        taken.append(int(pairs[:, taken].sum(axis=1).argmax()))
    return tuple(sorted(taken))


def _best_completions(item: Item, by: Strategy, completions: int | None, seed: int) -> tuple[tuple[int, ...], float]:
    """Completions of an item to label, and their score."""
    assert by != "random"
    rewards = item.rewards
    if rewards is None or rewards.ndim != 2 or rewards.shape[1] != len(item.completions):
        shape = None if rewards is None else rewards.shape
        count = len(item.completions)
        raise ValueError(f"{count} completions need rewards of shape (M, {count}), not {shape}")
    if not np.isfinite(rewards).all():
        raise ValueError("a reward is not finite")
    # In the order of the seed, so that sums and ties do not depend on the position of a completion.
    numbers = _distinct_completions(item, seed)
    scores = pair_scores(rewards[:, numbers], by)
    count = min(completions or len(numbers), len(numbers))
    taken = best_subset(scores, count)
    score = float(scores[np.ix_(taken, taken)].sum()) / (count * (count - 1))
    if completions is None:
        return tuple(range(len(item.completions))), score
    return tuple(sorted(numbers[position] for position in taken)), score


def _random_completions(item: Item, completions: int | None, seed: int) -> tuple[int, ...]:
    if completions is None:
        return tuple(range(len(item.completions)))
    return tuple(sorted(_distinct_completions(item, seed)[:completions]))


def _distinct_completions(item: Item, seed: int) -> list[int]:
    """Index of the first completion of each text, in an order that depends on prompt, texts and seed alone."""
    first = {text: number for number, text in reversed(list(enumerate(item.completions)))}
    return [first[text] for text in sorted(first, key=lambda text: _draw("completion", seed, item.key, text))]


def _position(item: Item, seed: int) -> tuple[bytes, list[bytes]]:
    """Sort key of an item that depends on the item and the seed alone."""
    return _draw("prompt", seed, item.key), sorted(
        _draw("completion", seed, item.key, text) for text in item.completions
    )


def _draw(*parts: str | int) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def _bits(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """-p log2 p, and 0 at p = 0."""
    return -p * np.log2(p, out=np.zeros_like(p), where=p > 0)


@lru_cache(maxsize=64)
def _subsets(size: int, count: int) -> NDArray[np.intp]:
    """All subsets of `count` of `size`: (S, count)."""
    return np.array(list(combinations(range(size), count)), dtype=np.intp)
