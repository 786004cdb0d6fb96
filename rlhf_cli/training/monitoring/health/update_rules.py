"""Health rules about the updates of a run: ratios, step sizes and the critic. See docs/health.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rlhf_cli.intervals import percent
from rlhf_cli.training.monitoring.health.findings import MIN_STEPS, STEP_LARGE, Finding, Run, Severity

RATIO_OFF, RATIO_BROKEN = 0.01, 0.05
"""Distances of the mean ratio of the first epoch from 1."""
NOISE_KL, NOISE_SHARE = 1e-3, 0.5
"""Approximate KL of the first epoch in nats per token, and its fraction of that of all epochs: above both, noise."""
STEP_TOO_LARGE, STEP_NONE = 0.2, 1e-7
"""Approximate KL of an update, in nats per token."""
CLIPPED_OFTEN, CLIPPED_MOSTLY = 0.2, 0.4
"""Fractions of tokens."""
SPIKE_RATIO, SPIKE_VARIANCE = 0.1, 1.0
"""Distance of a step's mean ratio from 1, and variance of its ratios."""
VALUE_LOSS_UP, VALUE_LOSS_EXPLODES = 3.0, 10.0
"""Factors on the value loss at the start."""
OFTEN = 0.1
"""Fraction of the steps."""

_FLOAT32 = "compute in float32: `--set model.precision=float32 --set model.dtype=float32`"


def first_ratio(run: Run) -> Iterator[Finding]:
    """Check whether each update starts from the policy that sampled."""
    off = [abs(value - 1.0) for value in run.curve("val/first_epoch_ratio").values]
    first, whole = run.curve("val/first_epoch_approxkl"), run.curve("policy/approxkl_avg")
    typical = sorted(off)[len(off) // 2] if off else 0.0
    is_noisy = run.reuses_completions and first.median > NOISE_KL and first.median > NOISE_SHARE * whole.median
    if typical <= RATIO_OFF and not is_noisy:
        return
    yield Finding(
        "first ratio",
        "bad" if typical > RATIO_BROKEN else "look",
        f"in the first epoch of an update the mean ratio is {typical:.3f} away from 1, and its approximate KL is "
        f"{first.median:.1e} nats per token (medians)",
        "before its first optimizer step the policy should agree with itself: either it does not, because two passes "
        "over the same tokens differ by rounding, or the first minibatches already move it far",
        (_FLOAT32, "lower `ppo.learning_rate` or `ppo.minibatches`"),
        run.span,
    )


def step_size(run: Run) -> Iterator[Finding]:
    """Check whether an update moves the policy by a sensible amount."""
    moved, clipped = run.curve("policy/approxkl_avg"), run.curve("policy/clipfrac_avg")
    if not len(moved) or not run.moves_ratio:
        return
    share = clipped.mean if len(clipped) else 0.0
    seen = (
        f"approximate KL {moved.mean:.2g} nats per token, {percent(share)} of tokens clipped (means over {moved.when})"
    )
    if moved.mean > STEP_LARGE or share > CLIPPED_OFTEN:
        severity: Severity = "bad" if moved.mean > STEP_TOO_LARGE or share > CLIPPED_MOSTLY else "look"
        means = "updates move the policy further than its completions justify"
        change = (
            "lower `ppo.learning_rate`, `ppo.epochs` or `ppo.minibatches`",
            "bound an update with `ppo.update_kl_limit` (0.02)",
        )
        yield Finding("update", severity, f"too large: {seen}", means, change, moved.span)
    elif moved.median < STEP_NONE and max(clipped.values, default=0.0) == 0.0:
        means = "the policy hardly moves: it learns nothing at this learning rate"
        yield Finding("update", "look", f"almost zero: {seen}", means, ("raise `ppo.learning_rate`",), moved.span)
    else:
        yield Finding("update", "fine", seen, steps=moved.span)


def spikes(run: Run) -> Iterator[Finding]:
    """Check whether single steps change the policy abruptly."""
    ratio, variance = run.curve("val/ratio"), run.curve("val/ratio_var")
    steps = {step for step, value in ratio if abs(value - 1.0) > SPIKE_RATIO}
    steps |= {step for step, value in variance if value > SPIKE_VARIANCE}
    if not steps:
        return
    listed = ", ".join(f"{step:,}" for step in sorted(steps)[:5]) + (", ..." if len(steps) > 5 else "")
    yield Finding(
        "ratio",
        "bad" if len(steps) > max(1, OFTEN * len(run)) else "look",
        f"the mean or the variance of a step's ratios spikes in {len(steps):,} of {len(run):,} steps ({listed})",
        "the probabilities of many tokens, or of a few extremely, change many-fold in one update",
        (
            "lower `ppo.learning_rate` or `ppo.epochs`, or bound an update with `ppo.update_kl_limit` (0.02)",
            "raise `ppo.temperature` if it is far below 1, which makes rare tokens less rare",
            "skip such minibatches with `ppo.ratio_limit`",
        ),
        (min(steps), max(steps)),
    )


def skipped(run: Run) -> Iterator[Finding]:
    """Check whether optimizer steps were skipped."""
    steps = [step for step, value in run.curve("skipped_steps") if value > 0]
    if not steps:
        return
    yield Finding(
        "skipped steps",
        "bad" if len(steps) > max(1, OFTEN * len(run)) else "look",
        f"optimizer steps were skipped in {len(steps):,} of {len(run):,} steps, first in step {steps[0]:,}",
        "a reward or a gradient was not finite, or a ratio exceeded its limit",
        (_FLOAT32, "lower `ppo.learning_rate`; check the rewards of unusual completions"),
        (steps[0], steps[-1]),
    )


def critic(run: Run) -> Iterator[Finding]:
    """Check whether the critic predicts returns better than a constant."""
    explained = run.curve("val/explained_variance")
    if len(explained) < MIN_STEPS:
        return
    late = explained.last(1 / 3)
    if late.mean < 0.0:
        yield Finding(
            "critic",
            "look",
            f"predicts returns worse than a constant: explained variance {late.mean:.2f} ({late.when})",
            "it learns too slowly or too unsteadily for returns that change; advantages are then mostly noise",
            (
                "raise `ppo.critic_learning_rate` or `ppo.value_coef`; lower them if `loss/value_avg` is erratic",
                "train it first with `ppo.critic_warmup_steps`, or initialize it differently with `ppo.critic_from`",
                "widen or drop `ppo.value_clip_range` if `val/clipfrac_avg` is high",
            ),
            late.span,
        )
    else:
        yield Finding("critic", "fine", f"explained variance {late.mean:.2f} at the end", steps=late.span)


def value_loss(run: Run) -> Iterator[Finding]:
    """Check whether the error of the critic grows."""
    curve = run.curve("loss/value_avg")
    if len(curve) < MIN_STEPS or curve.first().mean <= 0:
        return
    first, last = curve.first(), curve.last()
    factor = last.mean / first.mean
    if factor > VALUE_LOSS_UP:
        yield Finding(
            "value loss",
            "bad" if factor > VALUE_LOSS_EXPLODES else "look",
            f"grows {factor:.0f}-fold: {first.mean:.2g} ({first.when}) to {last.mean:.2g} ({last.when})",
            "returns grow faster than the critic learns, or its learning rate is too high",
            (
                "lower `ppo.critic_learning_rate`, or bound rewards with `ppo.reward_scale: running`",
                "cut single large rewards with `ppo.reward_clip`",
            ),
            last.span,
        )


UPDATE_RULES: tuple[Callable[[Run], Iterator[Finding]], ...] = (
    first_ratio,
    step_size,
    spikes,
    skipped,
    critic,
    value_loss,
)
