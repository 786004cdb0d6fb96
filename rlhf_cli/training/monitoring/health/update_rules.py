"""Health rules about the updates of a run: ratios, step sizes and the critic. See docs/health.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rlhf_cli.training.monitoring.health.findings import MIN_STEPS, STEP_LARGE, Finding, Run, Severity

RATIO_OFF, RATIO_BROKEN = 0.01, 0.05
"""Distances of the first epoch's mean ratio from 1."""
NOISE_KL, NOISE_SHARE = 1e-3, 0.5
"""A first epoch's approximate KL in nats a token, and its share of all epochs', that only noise explains."""
STEP_TOO_LARGE, STEP_NONE = 0.2, 1e-7
"""Nats a token, approximate KL of an update."""
CLIPPED_OFTEN, CLIPPED_MOSTLY = 0.2, 0.4
"""Shares of tokens."""
SPIKE_RATIO, SPIKE_VARIANCE = 0.1, 1.0
"""Distance of a step's mean ratio from 1, and variance of its ratios."""
VALUE_LOSS_UP, VALUE_LOSS_EXPLODES = 3.0, 10.0
"""Factors on the value loss at the start."""
OFTEN = 0.1
"""Share of the steps."""

_FLOAT32 = "compute in float32: `--set model.precision=float32 --set model.dtype=float32`"


def first_ratio(run: Run) -> Iterator[Finding]:
    """Whether training starts each update from the policy that sampled."""
    off = [abs(value - 1.0) for value in run.curve("val/first_epoch_ratio").values]
    first, whole = run.curve("val/first_epoch_approxkl"), run.curve("policy/approxkl_avg")
    typical = sorted(off)[len(off) // 2] if off else 0.0
    is_noisy = run.reuses_answers and first.median > NOISE_KL and first.median > NOISE_SHARE * whole.median
    if typical <= RATIO_OFF and not is_noisy:
        return
    yield Finding(
        "first ratio",
        "bad" if typical > RATIO_BROKEN else "look",
        f"in the first epoch of an update the mean ratio is {typical:.3f} away from 1, its approximate KL "
        f"{first.median:.1e} nats a token (medians)",
        "before its first step the policy should agree with itself: two passes over the same tokens differ by "
        "rounding, or the first minibatches move it far already",
        (_FLOAT32, "lower `ppo.learning_rate` or `ppo.minibatches`"),
        run.span,
    )


def step_size(run: Run) -> Iterator[Finding]:
    """Whether an update moves the policy by a sensible amount."""
    moved, clipped = run.curve("policy/approxkl_avg"), run.curve("policy/clipfrac_avg")
    if not len(moved) or not run.reuses_answers:
        return
    share = clipped.mean if len(clipped) else 0.0
    seen = f"approximate KL {moved.mean:.2g} nats a token, {share:.0%} of tokens clipped (means over {moved.when})"
    if moved.mean > STEP_LARGE or share > CLIPPED_OFTEN:
        severity: Severity = "bad" if moved.mean > STEP_TOO_LARGE or share > CLIPPED_MOSTLY else "look"
        means = "updates go further than the answers they learn from can vouch for"
        change = (
            "lower `ppo.learning_rate`, `ppo.epochs` or `ppo.minibatches`",
            "bound an update with `ppo.update_kl_limit` (0.02)",
        )
        yield Finding("update", severity, f"too large: {seen}", means, change, moved.span)
    elif moved.median < STEP_NONE and max(clipped.values, default=0.0) == 0.0:
        means = "the policy hardly moves: nothing is learned at this rate"
        yield Finding("update", "look", f"next to nothing: {seen}", means, ("raise `ppo.learning_rate`",), moved.span)
    else:
        yield Finding("update", "fine", seen, steps=moved.span)


def spikes(run: Run) -> Iterator[Finding]:
    """Whether single steps throw the policy about."""
    ratio, variance = run.curve("val/ratio"), run.curve("val/ratio_var")
    steps = {step for step, value in ratio if abs(value - 1.0) > SPIKE_RATIO}
    steps |= {step for step, value in variance if value > SPIKE_VARIANCE}
    if not steps:
        return
    largest = max(run.curve("val/largest_log_ratio"), key=lambda point: point[1], default=None)
    worst = "" if largest is None else f"; the largest log ratio is {largest[1]:.1f}, in step {largest[0]:,}"
    listed = ", ".join(f"{step:,}" for step in sorted(steps)[:5]) + (", ..." if len(steps) > 5 else "")
    yield Finding(
        "ratio",
        "bad" if len(steps) > max(1, OFTEN * len(run)) else "look",
        f"spikes in {len(steps):,} of {len(run):,} steps ({listed}){worst}",
        "a few tokens' probabilities change many-fold in one update; the warning at that step names the answer",
        (
            "lower `ppo.learning_rate` or `ppo.epochs`, or bound an update with `ppo.update_kl_limit` (0.02)",
            "raise `ppo.temperature` if it is far below 1: rare tokens then are less rare",
            "`ppo.ratio_limit` leaves such minibatches out",
        ),
        (min(steps), max(steps)),
    )


def skipped(run: Run) -> Iterator[Finding]:
    """Whether optimizer steps were left out."""
    steps = [step for step, value in run.curve("skipped_steps") if value > 0]
    if not steps:
        return
    yield Finding(
        "skipped steps",
        "bad" if len(steps) > max(1, OFTEN * len(run)) else "look",
        f"optimizer steps were left out in {len(steps):,} of {len(run):,} steps, first in step {steps[0]:,}",
        "a reward or a gradient was not finite, or a ratio was over its limit",
        (_FLOAT32, "lower `ppo.learning_rate`; check what the reward gives to odd answers"),
        (steps[0], steps[-1]),
    )


def critic(run: Run) -> Iterator[Finding]:
    """Whether the critic foresees more than a constant would."""
    explained = run.curve("val/explained_variance")
    if len(explained) < MIN_STEPS:
        return
    late = explained.last(1 / 3)
    if late.mean < 0.0:
        yield Finding(
            "critic",
            "look",
            f"foresees less than a constant would: explained variance {late.mean:.2f} ({late.when})",
            "it learns too slowly or too wildly for returns that move; advantages are then mostly noise",
            (
                "raise `ppo.critic_learning_rate` or `ppo.value_coef`; lower them if `loss/value_avg` jumps about",
                "give it a lead with `ppo.critic_warmup_steps`, or another start with `ppo.critic_from`",
                "widen or drop `ppo.value_clip_range` if `val/clipfrac_avg` is high",
            ),
            late.span,
        )
    else:
        yield Finding("critic", "fine", f"explained variance {late.mean:.2f} at the end", steps=late.span)


def value_loss(run: Run) -> Iterator[Finding]:
    """Whether the critic's error grows instead of shrinking."""
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
            "returns grow faster than the critic learns, or its rate is too high",
            (
                "lower `ppo.critic_learning_rate`, or keep rewards in bounds with `ppo.reward_scale: running`",
                "`ppo.reward_clip` cuts single large rewards",
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
