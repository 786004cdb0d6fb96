"""Active choice: which prompts and which of their answers to label, by what reward models think of them.

A reward model's preference for one answer over another is p = sigmoid(r_i - r_j) (Bradley and Terry 1952), with rewards
in the scale that the model was trained in. Multiplied by anything, they would still rank alike and prefer otherwise.

`uncertainty` is uncertainty sampling (Lewis and Gale 1994): the entropy of p, in bits, largest at p = 1/2, so for one
pair it is the same as the smallest margin. `disagreement` is the standard deviation of p over an ensemble (Christiano
et al. 2017, section 2.2.4, who take its square). Neither is a promise: Christiano et al. saw tasks where it hurt, and
Gleave and Irving (2022, arXiv:2203.07472) found ensembles of reward models on language no better than random choice. A
pair of answers that are equally good is uncertain for ever, and its label teaches little; an ensemble can agree on
that, one model cannot. And prompts are scored one by one: the best of them may all teach the same thing.

The held-out share of prompts, by which a reward model is measured, is never chosen by what reward models think: it
would be measured on the pairs it finds hardest, and no accuracy could be compared with any other.

Nothing depends on the order of prompts, or of a prompt's answers.
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
"""Up to so many ways to take k of K answers all are tried; 12 answers and fewer never have more."""


@dataclass(frozen=True)
class Item:
    """A prompt with the answers that could be labeled.

    Attributes:
        key: of the prompt, such as `prompt_key`; equal prompts have equal keys.
        answers: K texts, of which some may be equal.
        is_held_out: the prompt is one that reward models are measured on.
        rewards: (M, K) by M models, each in the scale it was trained in; None where nobody needs them: of held-out
            prompts, and for `random`.
    """

    key: str
    answers: tuple[str, ...]
    is_held_out: bool = False
    rewards: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Chosen:
    """A prompt to label.

    Attributes:
        item: its number.
        answers: numbers of the answers to label, rising.
        is_held_out: it was drawn at random, whatever the strategy.
        score: mean over the pairs of these answers, in bits (uncertainty) or as a standard deviation (disagreement);
            None for what was drawn at random.
        rank: 1 is the highest score; None where there is none.
    """

    item: int
    answers: tuple[int, ...]
    is_held_out: bool
    score: float | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Choice:
    """What is labeled, and what is not.

    Attributes:
        chosen: in the order of the items.
        passed_over: scores of the items that were scored and not chosen, highest first.
        alike: numbers of the items that were out of the question: all their answers have one text.
    """

    chosen: list[Chosen]
    passed_over: list[float]
    alike: list[int]


def choose(items: Sequence[Item], *, by: Strategy, prompts: int, completions: int | None, seed: int) -> Choice:
    """Choose prompts, and answers of each.

    A prompt's score is the mean over the pairs that would be labeled, not the largest: a ranking of K answers labels
    all C(K, 2), and among many pairs there nearly always is one near 1/2, so that the largest tells prompts apart
    badly. Of more than `completions` answers, those are taken whose pairs score most; by trying all subsets, or, where
    there are more than 1,000 of them, the best pair and then whichever answer adds most. Answers of equal text count
    once: their p is 1/2 for ever. Ties are broken by the seed.

    Held-out prompts keep their share of the prompts, to the nearest whole number and at least one on each side, and
    are drawn at random with random answers: the same ones for every strategy.

    Args:
        items: N.
        by: strategy.
        prompts: how many to choose; all are taken where there are no more.
        completions: answers of each, 2 or more; None leaves all in, equal ones too.
        seed: of what is random.

    Raises:
        ValueError: rewards of an item are missing or of another shape than its answers, or not finite.
    """
    alike = [number for number, item in enumerate(items) if len(set(item.answers)) < 2]
    usable = sorted(set(range(len(items))) - set(alike), key=lambda number: _place(items[number], seed))
    held_out = [number for number in usable if items[number].is_held_out]
    train = [number for number in usable if not items[number].is_held_out]
    held_out_count = held_out_share(len(train), len(held_out), prompts)
    drawn = held_out[:held_out_count]
    if by == "random":
        drawn += train[: prompts - held_out_count]
        train = []
    chosen = [
        Chosen(number, _random_answers(items[number], completions, seed), items[number].is_held_out) for number in drawn
    ]
    scored = [(number, *_best_answers(items[number], by, completions, seed)) for number in train]
    scored.sort(key=lambda row: -row[2])  # stable: equal scores stay in the order of the seed
    count = prompts - held_out_count
    chosen += [Chosen(row[0], row[1], False, row[2], rank) for rank, row in enumerate(scored[:count], start=1)]
    return Choice(sorted(chosen, key=lambda one: one.item), [row[2] for row in scored[count:]], alike)


def held_out_share(train: int, held_out: int, prompts: int) -> int:
    """How many of `prompts` are held-out ones.

    Args:
        train: prompts to choose from that are trained on.
        held_out: those that are held out.
        prompts: to choose.
    """
    prompts = min(prompts, train + held_out)
    if not held_out or not train or prompts < 2:
        # One prompt alone is for training on: without any there is nothing to measure.
        return min(held_out, max(0, prompts - train))
    nearest = (2 * prompts * held_out + train + held_out) // (2 * (train + held_out))
    least, most = max(1, prompts - train), min(held_out, prompts - 1)
    return min(max(nearest, least), most)


def preferences(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """p of answer i over answer j under each model, sigmoid(r_i - r_j): (M, K) to (M, K, K)."""
    # As tanh, it overflows for no difference.
    return 0.5 * (1.0 + np.tanh(0.5 * (rewards[:, :, np.newaxis] - rewards[:, np.newaxis, :])))


def pair_scores(rewards: NDArray[np.float64], by: Literal["uncertainty", "disagreement"]) -> NDArray[np.float64]:
    """What a label of each pair of answers promises.

    Args:
        rewards: (M, K); `uncertainty` is that of the mean preference of the models, which are one as a rule.
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
    scores = (scores + scores.T) / 2  # equal but for the last bit
    np.fill_diagonal(scores, 0.0)
    return scores


def best_subset(scores: NDArray[np.float64], count: int) -> tuple[int, ...]:
    """The `count` answers whose pairs score most together: exact up to 1,000 subsets, greedy beyond.

    Args:
        scores: (K, K), symmetric, with a diagonal of 0.
        count: 2 to K.
    """
    size = len(scores)
    if comb(size, count) <= _MOST_SUBSETS:
        subsets = _subsets(size, count)
        totals = scores[subsets[:, :, np.newaxis], subsets[:, np.newaxis, :]].sum(axis=(1, 2))
        return tuple(subsets[int(totals.argmax())].tolist())
    pairs = scores - np.diag(np.full(size, np.inf))  # no answer is taken twice, even where no pair promises anything
    taken = [int(number) for number in np.unravel_index(int(pairs.argmax()), pairs.shape)]
    while len(taken) < count:
        taken.append(int(pairs[:, taken].sum(axis=1).argmax()))
    return tuple(sorted(taken))


def _best_answers(item: Item, by: Strategy, completions: int | None, seed: int) -> tuple[tuple[int, ...], float]:
    """Answers of an item to label, and their score."""
    assert by != "random"
    rewards = item.rewards
    if rewards is None or rewards.ndim != 2 or rewards.shape[1] != len(item.answers):
        shape = None if rewards is None else rewards.shape
        raise ValueError(f"{len(item.answers)} answers need rewards of shape (M, {len(item.answers)}), not {shape}")
    if not np.isfinite(rewards).all():
        raise ValueError("a reward is not finite")
    # In the order of the seed, so that sums and ties come out alike wherever an answer stands.
    numbers = _distinct_answers(item, seed)
    scores = pair_scores(rewards[:, numbers], by)
    count = min(completions or len(numbers), len(numbers))
    taken = best_subset(scores, count)
    score = float(scores[np.ix_(taken, taken)].sum()) / (count * (count - 1))
    if completions is None:
        return tuple(range(len(item.answers))), score
    return tuple(sorted(numbers[place] for place in taken)), score


def _random_answers(item: Item, completions: int | None, seed: int) -> tuple[int, ...]:
    if completions is None:
        return tuple(range(len(item.answers)))
    return tuple(sorted(_distinct_answers(item, seed)[:completions]))


def _distinct_answers(item: Item, seed: int) -> list[int]:
    """The first answer of each text, in an order that depends on prompt, texts and seed alone."""
    first = {text: number for number, text in reversed(list(enumerate(item.answers)))}
    return [first[text] for text in sorted(first, key=lambda text: _draw("answer", seed, item.key, text))]


def _place(item: Item, seed: int) -> tuple[bytes, list[bytes]]:
    """Sorts items in an order that depends on them and the seed alone."""
    return _draw("prompt", seed, item.key), sorted(_draw("answer", seed, item.key, text) for text in item.answers)


def _draw(*parts: str | int) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def _bits(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """-p log2 p, which is 0 at 0."""
    return -p * np.log2(p, out=np.zeros_like(p), where=p > 0)


@lru_cache(maxsize=64)
def _subsets(size: int, count: int) -> NDArray[np.intp]:
    """All ways to take `count` of `size`: (S, count)."""
    return np.array(list(combinations(range(size), count)), dtype=np.intp)
