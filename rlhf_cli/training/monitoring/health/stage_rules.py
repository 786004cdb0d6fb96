"""Health rules of supervised fine-tuning and of reward models: from their curves, and from what they measured at their
end. See docs/health.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_cli.intervals import percent, percent_span
from rlhf_cli.training.monitoring.curves import Curve
from rlhf_cli.training.monitoring.health.findings import MIN_STEPS, Finding

Metrics = Mapping[str, float | None]
"""Metrics of a finished stage; empty for an unfinished one."""

LIKELY, CERTAIN = 2.0, 3.0
"""Standard errors."""
OVERFIT = 0.2
"""By how much the accuracy in training may exceed the held-out one."""
FORGETS = 0.5
"""Nats per token by which the held-out loss may exceed the training loss of the last steps."""
CHANCE = 0.5


def judge_sft(rows: Sequence[Mapping[str, Any]], metrics: Metrics) -> Iterator[Finding]:
    """Judge supervised fine-tuning.

    Args:
        rows: of `metrics.jsonl`.
        metrics: of the finished stage.
    """
    curve = Curve.of(rows, "loss")
    yield from _loss(rows, curve, "sft")
    before, after = metrics.get("eval_loss_before"), metrics.get("eval_loss")
    if before is None or after is None:
        return
    seen = f"held-out loss {before:.3f} before and {after:.3f} after, in nats per token"
    smaller = ("lower `sft.learning_rate` or `sft.epochs`", "give more demonstrations")
    if after > before:
        means = "the model became worse at demonstrations that it was not trained on"
        yield Finding("held-out loss", "bad", seen, means, smaller)
    elif len(curve) >= MIN_STEPS and after > curve.last(0.1).mean + FORGETS:
        means = f"it memorizes: the training loss of the last steps is {curve.last(0.1).mean:.3f}"
        yield Finding("held-out loss", "look", seen, means, smaller)
    else:
        yield Finding("held-out loss", "fine", seen)


def judge_reward_model(rows: Sequence[Mapping[str, Any]], metrics: Metrics) -> Iterator[Finding]:
    """Judge a reward model; see `judge_sft`."""
    yield from _loss(rows, Curve.of(rows, "loss"), "train_rm")
    accuracy = metrics.get("rm/accuracy")
    if accuracy is None:
        yield from _training_accuracy(Curve.of(rows, "accuracy"))
        return
    low, high = metrics.get("rm/accuracy_low") or 0.0, metrics.get("rm/accuracy_high") or 1.0
    seen = f"{percent(accuracy)} of the held-out pairs ({percent_span(low, high)})"
    more = ("label more prompts", "check that the best completion stands first (or is `chosen`) in all of the data")
    if high < CHANCE:
        yield Finding("accuracy", "bad", f"below chance: {seen}", "the labels are reversed", more[1:])
    elif low <= CHANCE:
        means = "the reward is noise as far as can be told, and PPO would optimize noise"
        yield Finding("accuracy", "bad", f"may be chance: {seen}", means, (*more, "raise `train_rm.epochs`"))
    else:
        yield Finding("accuracy", "fine", seen)
    yield from _overfit(accuracy, metrics.get("rm/train_accuracy"))
    yield from _length(accuracy, metrics)


def judge_evaluation(_rows: Sequence[Mapping[str, Any]], metrics: Metrics) -> Iterator[Finding]:
    """Judge a comparison of two policies; see `judge_sft`."""
    rate = metrics.get("win_rate")
    # With several pairs of models, the intervals that hold for all of them decide, as they do in `evaluate`.
    low, high = (metrics.get(f"win_rate_joint_{end}", metrics.get(f"win_rate_{end}")) for end in ("low", "high"))
    if rate is None or low is None or high is None:
        return
    seen = f"win rate {percent(rate)} ({percent_span(low, high)}) against the baseline"
    if high < CHANCE:
        means = "training made the completions worse than those it started from"
        change = ("read the completions of `evaluate`", "compare the reward with what decides the wins")
        yield Finding("win rate", "bad", seen, means, change)
    elif low <= CHANCE:
        means = "no difference can be detected with this number of prompts"
        yield Finding("win rate", "look", seen, means, ("evaluate on more prompts",))
    else:
        yield Finding("win rate", "fine", seen)


def _loss(rows: Sequence[Mapping[str, Any]], curve: Curve, section: str) -> Iterator[Finding]:
    lost = [row["step"] for row in rows if "loss" in row and row["loss"] is None]
    if lost:
        yield Finding(
            "loss",
            "bad",
            f"not finite in {len(lost):,} of {len(rows):,} steps, first in step {lost[0]:,}",
            "the learning rate is too high, or values overflow at this precision",
            (f"lower `{section}.learning_rate`", "compute in float32: `--set model.precision=float32`"),
            (lost[0], lost[-1]),
        )
    if len(curve) < MIN_STEPS:
        return
    first, last = curve.first(0.1), curve.last(0.1)
    fell = first.mean - last.mean
    noise = curve.noise * (1 / len(first) + 1 / len(last)) ** 0.5
    seen = f"{first.mean:.3f} ({first.when}) to {last.mean:.3f} ({last.when})"
    lower = f"lower `{section}.learning_rate`"
    if fell < -CERTAIN * noise:
        yield Finding("loss", "bad", f"rises: {seen}", "the learning rate is too high", (lower,), curve.span)
    elif fell < LIKELY * noise:
        means = "the learning rate is too small or too high, or there are too few steps"
        change = (f"raise `{section}.learning_rate`, or lower it if the loss jumps", f"raise `{section}.epochs`")
        yield Finding("loss", "look", f"does not fall by more than its noise: {seen}", means, change, curve.span)
    else:
        yield Finding("loss", "fine", f"falls: {seen}", steps=curve.span)


def _training_accuracy(curve: Curve) -> Iterator[Finding]:
    """Judge the accuracy in training, where the held-out one is not measured yet."""
    if len(curve) < MIN_STEPS:
        return
    late = curve.last(1 / 3)
    seen = f"{percent(late.mean)} of the pairs in training ({late.when})"
    if late.mean - LIKELY * late.error <= CHANCE:
        means = "nothing is learned from the rankings yet"
        change = ("raise `train_rm.learning_rate` or `train_rm.epochs`", "check the labels")
        yield Finding("accuracy", "look", f"no better than chance: {seen}", means, change, late.span)
    else:
        yield Finding("accuracy", "fine", seen, steps=late.span)


def _overfit(accuracy: float, in_training: float | None) -> Iterator[Finding]:
    if in_training is not None and in_training - accuracy > OVERFIT:
        yield Finding(
            "overfitting",
            "look",
            f"accuracy {percent(in_training)} in training, {percent(accuracy)} on held-out prompts",
            "it memorizes its rankings: PPO will find completions on which it is wrong",
            ("lower `train_rm.epochs` or `train_rm.learning_rate`", "label more prompts"),
        )


def _length(accuracy: float, metrics: Metrics) -> Iterator[Finding]:
    rules = {"longer": metrics.get("rm/always_longer"), "shorter": metrics.get("rm/always_shorter")}
    for which, share in rules.items():
        if share is not None and share >= accuracy > CHANCE:
            yield Finding(
                "reward and length",
                "look",
                f"always preferring the {which} completion is right for {percent(share)} of the pairs, the reward "
                f"model for {percent(accuracy)}",
                "length alone explains the labels as well: PPO may only change the length",
                ("label pairs of similar length", "set `ppo.length_penalty`, and watch `length/mean`"),
            )
