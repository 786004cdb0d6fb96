"""What each detector measures in a step, and which completions show it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_cli.training.monitoring.detectors.observation import WINDOW, DetectorState, Observation
from rlhf_cli.training.monitoring.detectors.phrases import most_risen, phrase_shares, phrases_of, repeated_share

MOST_TEXTS = 512
"""Completions of a step whose words are compared: more would tell little more, and take seconds."""
_NOISE = 2 * math.sqrt(2)
"""Standard errors of a mean below which the difference of two such means may be noise: two of the difference."""
_RARE = 0.05
"""Phrases of a smaller share in the first steps are forgotten, so that a checkpoint stays small."""


def spread_of(values: Sequence[float]) -> float:
    """Return the standard deviation of a population; NaN where a value is not finite."""
    mean = statistics.fmean(values)
    return math.sqrt(statistics.fmean((value - mean) ** 2 for value in values))


def kl(seen: Observation) -> float:
    """Return the mean KL, in nats per completion."""
    return statistics.fmean(seen.kl)


def length(seen: Observation) -> float:
    """Return the mean length in tokens."""
    return statistics.fmean(seen.lengths)


def entropy(seen: Observation) -> float | None:
    """Return the entropy in nats per token; None where no policy was updated."""
    value = seen.metrics.get("policy/entropy_avg", math.nan)
    return value if math.isfinite(value) else None


def reward_spread(seen: Observation) -> float:
    """Return the standard deviation of the rewards."""
    return spread_of(seen.scores)


def repetition(seen: Observation) -> float:
    """Return the mean share of repeated sequences of four words."""
    return statistics.fmean(map(repeated_share, seen.texts[:MOST_TEXTS]))


def length_correlation(seen: Observation) -> float | None:
    """Return the absolute correlation (Pearson) of reward and length; None where one of them is constant."""
    if len(set(seen.lengths)) < 2 or len(set(seen.scores)) < 2:
        return None
    return abs(statistics.correlation([float(tokens) for tokens in seen.lengths], seen.scores))


def spreads(members: Sequence[Sequence[float]]) -> list[float]:
    """Return the standard deviation between the members of an ensemble, per completion.

    Args:
        members: per member one weighted reward per completion.
    """
    return [spread_of(rewards) for rewards in zip(*members, strict=True)]


def outside(scores: Sequence[float], reward_range: tuple[float, float]) -> list[float]:
    """Return how far each reward is outside a range; 0 inside."""
    low, high = reward_range
    return [max(low - score, score - high, 0.0) for score in scores]


def phrase(seen: Observation, state: DetectorState) -> float | None:
    """Return by how much the share of the most risen phrase rose; None in the first steps, which are compared with.

    Called once per step, before `state.steps` counts it; remembers the phrases of the first steps, and the most risen.
    """
    shares = phrase_shares(seen.prompts[:MOST_TEXTS], seen.texts[:MOST_TEXTS])
    if state.steps < WINDOW:
        for words, share in shares.items():
            key = " ".join(words)
            state.phrases[key] = state.phrases.get(key, 0.0) + share / WINDOW
        if state.steps == WINDOW - 1:
            state.phrases = {key: share for key, share in state.phrases.items() if share >= _RARE}
        return None
    before = {tuple(key.split(" ")): share for key, share in state.phrases.items()}
    words, risen = most_risen(shares, before)
    state.phrase = " ".join(words)
    return risen


def holders(seen: Observation, words: str) -> list[bool]:
    """Return which completions contain a phrase, in the form of `DetectorState.phrase`."""
    sought = tuple(words.split(" "))
    return [sought in phrases_of(text) for text in seen.texts]


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    error: float


def fall(
    state: DetectorState, name: str, value: float, *, error: float, spread: float, training: Estimate | None
) -> float | None:
    """Return how far a reward fell below its best, in standard deviations, less two standard errors; at least 0.

    0 where the training reward fell too: then the policy became worse at all it is trained for.

    Args:
        state: remembers the best.
        name: of the reward.
        value: its mean now.
        error: standard error of that.
        spread: standard deviation of the reward.
        training: training reward of the last steps; None where nothing was trained yet.
    """
    if not all(map(math.isfinite, (value, error, spread))):
        return None
    best = state.best.get(name)
    if best is None or value > best[0]:
        state.best[name] = [value] if training is None else [value, training.mean]
        return None if best is None else 0.0
    fell_too = training is not None and len(best) > 1 and training.mean < best[1] - _NOISE * training.error
    if training is None or fell_too or spread <= 0:
        return 0.0
    return max(best[0] - value - _NOISE * error, 0.0) / spread


def weighted(parts: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> list[list[float]]:
    """Return the weighted rewards of the members of an ensemble: those with a weight other than 0."""
    return [[weights[name] * score for score in parts[name]] for name in parts if weights.get(name)]
