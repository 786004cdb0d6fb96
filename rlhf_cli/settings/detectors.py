"""The section `ppo.detectors`: thresholds of what a PPO run watches itself for. docs/health.md gives their reasons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import model_validator

from rlhf_cli.settings.base import EffortOnly, Positive, Section

FALLING = frozenset({"entropy", "reward_spread"})
"""Detectors of what becomes too small; all others are of what becomes too large."""


class DetectorLimits(Section):
    """Thresholds of one detector, in its own unit. Each may change at any time, also to continue a stopped run."""

    warn: Annotated[Positive | None, EffortOnly()] = None
    """Threshold of the warning; null does not warn. Each detector has its own default; see docs/health.md."""
    stop: Annotated[Positive | None, EffortOnly()] = None
    """Threshold at which the run saves its state and stops with exit code 70; null never stops."""


class DetectorSettings(Section):
    """What PPO checks after every step, averaged over the last three. The defaults of `warn` are in docs/health.md."""

    kl: DetectorLimits = DetectorLimits(warn=30.0)
    """KL to the SFT model, in nats per completion."""
    length: DetectorLimits = DetectorLimits(warn=2.5)
    """Factor between the mean length and that of the first three steps: 2.5 is 2.5 times as long or as short."""
    entropy: DetectorLimits = DetectorLimits(warn=0.2)
    """Entropy per token as a share of that of the first three steps; acts below the threshold."""
    reward_spread: DetectorLimits = DetectorLimits(warn=0.05)
    """Standard deviation of the rewards of a step as a share of that of the first three; acts below the threshold."""
    reward_range: DetectorLimits = DetectorLimits(warn=0.75)
    """Share of completions whose reward is outside the range of the reward model's held-out rankings; only with a
    reward model that `train-rm` wrote."""
    phrase: DetectorLimits = DetectorLimits(warn=0.5)
    """How far the policy writes one rewarded phrase for every prompt: the rise, since the first three steps, of the
    share of prompts whose completions contain the same three words, times the correlation between containing
    them and the reward."""
    repetition: DetectorLimits = DetectorLimits(warn=0.2)
    """Mean share of a completion's four-word sequences that repeat earlier ones, minus that of the first three
    steps."""
    length_correlation: DetectorLimits = DetectorLimits(warn=0.8)
    """Absolute correlation of reward and length over the completions of a step."""
    disagreement: DetectorLimits = DetectorLimits(warn=2.0)
    """Standard deviation between the members of an ensemble (`reward_combination` other than `sum`), as a factor of
    that of the first three steps."""
    held_out: DetectorLimits = DetectorLimits(warn=0.25)
    """How far the mean held-out reward is below its best, less two standard errors, in standard deviations of the
    held-out rewards; 0 if the training reward fell too. Needs `eval_steps`."""
    gold: DetectorLimits = DetectorLimits(warn=0.25)
    """The same for rewards with weight 0, over the training completions of three steps."""

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults(cls, given: Any) -> Any:
        """Keep the default of `warn` where only `stop` is given, and the other way round."""
        if not isinstance(given, Mapping):
            return given
        kept = {name: field.default.model_dump() for name, field in cls.model_fields.items()}
        return {
            name: {**kept[name], **limits} if name in kept and isinstance(limits, Mapping) else limits
            for name, limits in given.items()
        }

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for name in type(self).model_fields:
            limits: DetectorLimits = getattr(self, name)
            if limits.warn is None or limits.stop is None or limits.warn == limits.stop:
                continue
            falls = name in FALLING
            if (limits.stop > limits.warn) == falls:
                raise ValueError(
                    f"`{name}.stop: {limits.stop:g}` is reached before `{name}.warn: {limits.warn:g}`: it must be at "
                    f"{'most' if falls else 'least'} that"
                )
        return self
