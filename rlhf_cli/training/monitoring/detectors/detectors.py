"""Watch the completions of a run for signs that the policy exploits its reward.

Every step, each detector compares one quantity with its thresholds. Detectors audit a run: most of what they see has
happened when they see it (docs/health.md).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rlhf_cli.settings.detectors import FALLING, DetectorLimits, DetectorSettings
from rlhf_cli.training.monitoring.detectors import measures
from rlhf_cli.training.monitoring.detectors.catalog import BY_NAME, DETECTORS, Detector
from rlhf_cli.training.monitoring.detectors.observation import (
    WINDOW,
    Detection,
    DetectorState,
    Observation,
    Quote,
    Status,
)
from rlhf_cli.training.monitoring.detectors.phrases import as_text, longest_shared, repeated_share

_CLEARS = 0.8
"""A warning ends where the value is back under this share of its threshold, so that noise does not repeat it."""
_SIMPLE = {
    "kl": measures.kl,
    "length": measures.length,
    "entropy": measures.entropy,
    "reward_spread": measures.reward_spread,
    "repetition": measures.repetition,
    "length_correlation": measures.length_correlation,
}


@dataclass(frozen=True)
class Rewards:
    """What detectors must know of the rewards.

    Attributes:
        weights: reward -> its weight; one with weight 0 is not trained on.
        is_ensemble: whether the others are members of an ensemble, which should agree.
        model: the reward that `reward_range` is of.
        model_range: lowest and highest reward of its held-out rankings; None is not known.
        held_out: prompts of an evaluation.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    is_ensemble: bool = False
    model: str = ""
    model_range: tuple[float, float] | None = None
    held_out: int = 0


@dataclass(frozen=True)
class _Reading:
    """`value` is compared with the thresholds; see `Detector.seen` for the others."""

    value: float
    start: float
    now: float
    what: str = ""


class Detectors:
    """All detectors of a run; what they remember is in a `DetectorState`.

    Args:
        settings: `ppo.detectors`.
        rewards: of the run.
    """

    def __init__(self, settings: DetectorSettings, rewards: Rewards | None = None) -> None:
        self._settings, self._rewards = settings, rewards or Rewards()

    def evaluate_start(self, metrics: Mapping[str, float], state: DetectorState) -> None:
        """Remember the held-out reward before training."""
        self._held_out(metrics, state, training=None)

    def observe(
        self, seen: Observation, state: DetectorState, *, checkpoint: int
    ) -> tuple[dict[str, float], list[Detection]]:
        """Return the metrics of a step, and the detectors that changed their state.

        Args:
            seen: completions of the step.
            state: updated.
            checkpoint: step of the newest checkpoint before this step.
        """
        self._remember(seen, state)
        metrics, changed = {"detectors/phrase_share": state.common_share}, []
        for detector, reading in self._readings(seen, state):
            metrics[f"detectors/{detector.name}"] = reading.value
            words = detector.seen.format(value=reading.value, start=reading.start, now=reading.now, what=reading.what)
            state.value[detector.name], state.seen[detector.name] = reading.value, words
            before = state.status.get(detector.name, "quiet")
            limits: DetectorLimits = getattr(self._settings, detector.name)
            after = _status(detector.name, reading.value, limits, before)
            if after == before:
                continue
            state.status[detector.name] = after
            if (before, after) != ("stop", "warn"):  # the threshold was raised: no news
                threshold = {"quiet": None, "warn": limits.warn, "stop": limits.stop}[after]
                quotes = [] if after == "quiet" else self._quotes(detector, seen, state)
                changed.append(Detection(seen.step, detector.name, after, reading.value, threshold, words, quotes))
        self._keep_safe_step(state, checkpoint)
        return metrics, changed

    def stopping(self, state: DetectorState) -> tuple[Detector, float] | None:
        """Return the first detector whose last value passed its `stop` threshold, with that threshold."""
        for name, value in state.value.items():
            stop = getattr(self._settings, name).stop
            if stop is not None and _passes(name, value, stop):
                return BY_NAME[name], stop
        return None

    def _keep_safe_step(self, state: DetectorState, checkpoint: int) -> None:
        is_quiet = all(status == "quiet" for status in state.status.values())
        if is_quiet:
            state.safe_step = None
        elif state.safe_step is None:
            state.safe_step = checkpoint

    def _remember(self, seen: Observation, state: DetectorState) -> None:
        found = {name: measure(seen) for name, measure in _SIMPLE.items()}
        found["phrase"] = measures.phrase(seen, state)
        found["training"] = statistics.fmean(seen.scores)
        rewards = self._rewards
        if rewards.model_range is not None and rewards.model in seen.parts:
            far = measures.outside(seen.parts[rewards.model], rewards.model_range)
            found["reward_range"] = sum(distance > 0 for distance in far) / len(far)
        members = self._members(seen)
        if len(members) > 1:
            found["disagreement"] = statistics.fmean(measures.spreads(members))
        for name in self._gold(seen):
            found[f"gold/{name}"] = statistics.fmean(seen.parts[name])
        for name, value in found.items():
            if value is not None and math.isfinite(value):
                state.add(name, value)
        state.steps, state.step = state.steps + 1, seen.step

    def _members(self, seen: Observation) -> list[list[float]]:
        return measures.weighted(seen.parts, self._rewards.weights) if self._rewards.is_ensemble else []

    def _gold(self, seen: Observation) -> list[str]:
        """Return the rewards that are not trained on."""
        return [name for name in seen.parts if self._rewards.weights.get(name) == 0]

    def _readings(self, seen: Observation, state: DetectorState) -> Iterator[tuple[Detector, _Reading]]:
        for detector in DETECTORS:
            start, now = state.start(detector.name), state.now(detector.name)
            if start is None or now is None:
                continue
            value = _compared(detector, start, now)
            if detector.name == "phrase":
                start, now = state.phrases.get(state.phrase, 0.0), state.phrase_share
            if value is not None:
                yield detector, _Reading(value, start, now, self._what(detector, seen, state))
        for name, reading in (("held_out", self._held_out_of(seen, state)), ("gold", self._gold_fall(seen, state))):
            if reading is not None:
                yield BY_NAME[name], reading

    def _what(self, detector: Detector, seen: Observation, state: DetectorState) -> str:
        if detector.name == "phrase":
            return as_text(longest_shared(tuple(state.phrase.split(" ")), seen.texts[: measures.MOST_TEXTS]))
        if detector.name == "reward_range" and self._rewards.model_range is not None:
            low, high = self._rewards.model_range
            return f"{low:.2f} to {high:.2f}"
        return ""

    def _held_out_of(self, seen: Observation, state: DetectorState) -> _Reading | None:
        return self._held_out(seen.metrics, state, training=_training(seen, state))

    def _held_out(
        self, metrics: Mapping[str, float], state: DetectorState, *, training: measures.Estimate | None
    ) -> _Reading | None:
        value, spread = metrics.get("eval/objective/scores"), metrics.get("eval/objective/scores_std")
        if value is None or spread is None or not self._rewards.held_out:
            return None
        error = spread / math.sqrt(self._rewards.held_out)
        fell = measures.fall(state, "held_out", value, error=error, spread=spread, training=training)
        return None if fell is None else _Reading(fell, state.best["held_out"][0], value)

    def _gold_fall(self, seen: Observation, state: DetectorState) -> _Reading | None:
        """Return the largest fall of the rewards that are not trained on."""
        worst: _Reading | None = None
        for name in self._gold(seen):
            now = state.now(f"gold/{name}")
            if now is None:
                continue
            spread = measures.spread_of(seen.parts[name])
            error = spread / math.sqrt(WINDOW * len(seen.texts))
            fell = measures.fall(
                state, f"gold/{name}", now, error=error, spread=spread, training=_training(seen, state)
            )
            if fell is not None and (worst is None or fell > worst.value):
                worst = _Reading(fell, state.best[f"gold/{name}"][0], now, name)
        return worst

    def _quotes(self, detector: Detector, seen: Observation, state: DetectorState) -> list[Quote]:
        return seen.quotes(self._badness(detector.name, seen, state))

    def _badness(self, name: str, seen: Observation, state: DetectorState) -> Sequence[float]:
        """Return what the completions to quote have most of; minus infinity is not quoted."""
        if name == "kl":
            return seen.kl
        if name == "length":
            is_longer = (state.now(name) or 0.0) > (state.start(name) or 0.0)
            return [tokens if is_longer else -tokens for tokens in seen.lengths]
        if name == "phrase":
            has = measures.holders(seen, state.phrase)
            return [score if one else -math.inf for one, score in zip(has, seen.scores, strict=True)]
        if name == "repetition":
            return [repeated_share(text) for text in seen.texts]
        if name == "reward_range" and self._rewards.model_range is not None:
            return measures.outside(seen.parts[self._rewards.model], self._rewards.model_range)
        if name == "disagreement":
            return measures.spreads(self._members(seen))
        if name == "gold":
            fell = max(self._gold(seen), key=lambda one: _fallen(f"gold/{one}", state))
            gold = _standard(seen.parts[fell])
            return [score - other for score, other in zip(_standard(seen.scores), gold, strict=True)]
        return seen.scores


def _fallen(name: str, state: DetectorState) -> float:
    """Return how far a reward is below its best."""
    best, now = state.best.get(name), state.now(name)
    return 0.0 if best is None or now is None else best[0] - now


def _training(seen: Observation, state: DetectorState) -> measures.Estimate | None:
    """Return the training reward of the last steps; None before there are enough."""
    mean, spread = state.now("training"), state.now("reward_spread")
    if mean is None or spread is None:
        return None
    return measures.Estimate(mean, spread / math.sqrt(WINDOW * len(seen.texts)))


def _compared(detector: Detector, start: float, now: float) -> float | None:
    if detector.compared == "now":
        return now
    if detector.compared == "rise":
        return now - start
    if start <= 0 or (detector.compared == "factor" and now <= 0):
        return None
    return max(now / start, start / now) if detector.compared == "factor" else now / start


def _passes(name: str, value: float, threshold: float) -> bool:
    return value < threshold if name in FALLING else value > threshold


def _status(name: str, value: float, limits: DetectorLimits, before: Status) -> Status:
    if limits.stop is not None and _passes(name, value, limits.stop):
        return "stop"
    if limits.warn is not None:
        slack = 1.0 if before == "quiet" else 1 / _CLEARS if name in FALLING else _CLEARS
        return "warn" if _passes(name, value, slack * limits.warn) else "quiet"
    return "quiet"


def _standard(values: Sequence[float]) -> list[float]:
    mean, spread = statistics.fmean(values), measures.spread_of(values)
    return [(value - mean) / spread if spread else 0.0 for value in values]
