"""What each detector measures in a step, and which completions show it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_cli.training.monitoring.detectors.observation import WINDOW, DetectorState, Observation
from rlhf_cli.training.monitoring.detectors.phrases import phrase_uses, phrases_of, repeated_share, rise

MOST_TEXTS = 512
"""Completions of a step whose words are compared: more would tell little more, and take seconds."""
_NOISE = 2 * math.sqrt(2)
"""Standard errors of a mean below which the difference of two such means may be noise: two of the difference."""
_RARE, _MOST_PHRASES = 0.05, 500
"""Phrases of a smaller share in a step are not counted, and so many are remembered: a checkpoint stays small."""


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
    """Return how far the policy gives a phrase that pays to every prompt: 1 where it is the reward.

    The largest product, over the phrases of a step, of the rise of the phrase's share since the first steps and of the
    correlation between having it and the reward, within steps, over the whole run. None in the first steps.

    Called once per step, before `state.steps` counts it; remembers phrases, and which one it was.
    """
    texts, scores = seen.texts[:MOST_TEXTS], seen.scores[:MOST_TEXTS]
    uses = phrase_uses(seen.prompts[:MOST_TEXTS], texts, scores)
    keys = {words: " ".join(words) for words, use in uses.items() if use.share >= _RARE}
    state.common_share = max((use.share for use in uses.values()), default=0.0)
    mean = statistics.fmean(scores)
    state.variation += sum((score - mean) ** 2 for score in scores)
    for words, key in keys.items():
        use, paid = uses[words], state.paid.setdefault(key, [0.0, 0.0])
        paid[0] += use.count - use.count**2 / len(texts)
        paid[1] += use.excess
    state.paid = dict(sorted(state.paid.items(), key=lambda item: (-item[1][0], item[0]))[:_MOST_PHRASES])
    if state.steps < WINDOW:
        for words, key in keys.items():
            state.phrases[key] = state.phrases.get(key, 0.0) + uses[words].share / WINDOW
        return None
    values = {
        words: rise(uses[words].share, state.phrases.get(key, 0.0)) * _paid(state, key) for words, key in keys.items()
    }
    words = max(values, key=lambda one: (values[one], one), default=())
    state.phrase = keys.get(words, "")
    state.phrase_share = uses[words].share if words else 0.0
    return values.get(words, 0.0)


def _paid(state: DetectorState, key: str) -> float:
    """Return the correlation between having a phrase and the reward; 0 where it is negative."""
    has, both = state.paid.get(key, (0.0, 0.0))
    return max(both, 0.0) / math.sqrt(has * state.variation) if has > 0 and state.variation > 0 else 0.0


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
    # The best may be that before training, when no training reward was measured.
    before = best[1] if len(best) > 1 else state.start("training")
    fell_too = training is not None and before is not None and training.mean < before - _NOISE * training.error
    if training is None or fell_too or spread <= 0:
        return 0.0
    return max(best[0] - value - _NOISE * error, 0.0) / spread


def weighted(parts: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> list[list[float]]:
    """Return the weighted rewards of the members of an ensemble: those with a weight other than 0."""
    return [[weights[name] * score for score in parts[name]] for name in parts if weights.get(name)]
