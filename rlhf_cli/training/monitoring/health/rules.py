"""Health rules about the completions of a run: reward, KL, entropy and length. See docs/health.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rlhf_cli.intervals import percent
from rlhf_cli.training.monitoring.curves import Curve
from rlhf_cli.training.monitoring.health.findings import MIN_STEPS, STEP_LARGE, Finding, Run, Severity

CERTAIN = 3.0
"""Standard errors above which a slope or a difference counts as more than noise."""
LIKELY = 2.0
KL_FAR, KL_TOO_FAR = 30.0, 50.0
"""Nats per completion."""
KL_SETTLED = 10.0
"""Nats per completion below which a growing KL is harmless."""
KL_NEGATIVE = -0.1
"""Nats per completion: the noise of the estimate does not explain a mean below this over a block of steps."""
ENTROPY_LOW, ENTROPY_COLLAPSED = 0.2, 0.05
"""Fractions of the entropy at the start."""
LONGER, MUCH_LONGER = 2.0, 4.0
SHORTER, MUCH_SHORTER = 0.4, 0.15
"""Factors on the length at the start."""
ENDED_HALF, ENDED_HARDLY = 0.5, 0.1
"""Fractions of completions that finish."""
SPREAD_GONE = 0.05
"""Fraction of the rewards' standard deviation at the start."""
FOLLOWS = 0.25
"""Smallest fraction of the training reward's rise that held-out prompts should show."""


def reward(run: Run) -> Iterator[Finding]:
    """Check whether the reward rises by more than its noise."""
    curve = run.curve("objective/scores")
    if len(curve) < MIN_STEPS:
        return
    first, last = curve.first(0.1), curve.last()
    trend, rise = curve.trend, last.mean - first.mean
    noise = curve.noise * (1 / len(first) + 1 / len(last)) ** 0.5
    seen = f"{first.mean:.2f} ({first.when}) to {last.mean:.2f} ({last.when})"
    slope = f"slope {100 * trend.slope:+.2f} +- {100 * trend.error:.2f} per 100 steps"
    if trend.certainty < -CERTAIN and rise < -LIKELY * noise:
        yield Finding(
            "reward",
            "bad",
            f"falls: {seen}; {slope}",
            "steps are too large for the accuracy of the critic, or the penalties outweigh the reward",
            (
                "lower `ppo.learning_rate`, or train the critic first with `ppo.critic_warmup_steps`",
                "lower `ppo.kl_coef`, `ppo.missing_eos_penalty` or `ppo.length_penalty` if they are large",
            ),
            curve.span,
        )
    elif trend.certainty < LIKELY and rise < LIKELY * noise:
        means, change = _no_rise(run)
        seen = f"does not rise by more than its noise: {seen}; {slope}"
        yield Finding("reward", "look", seen, means, change, curve.span)
    else:
        yield Finding("reward", "fine", f"rises: {seen}", steps=curve.span)


def _no_rise(run: Run) -> tuple[str, tuple[str, ...]]:
    """Return what a reward that does not rise means, which depends on the size of the updates."""
    if run.curve("policy/approxkl_avg").mean > STEP_LARGE:
        return (
            "updates are too large to learn from: each undoes the gain of the one before",
            ("lower `ppo.learning_rate`; see `update`",),
        )
    return (
        "the learning rate is too small, a step has too few completions for so noisy a reward, the KL penalty is too "
        "large, or the reward cannot tell these completions apart",
        (
            "raise `ppo.learning_rate` while `policy/approxkl_avg` is under 0.02",
            "raise `ppo.prompts_per_step`, or `ppo.steps`",
            "lower `ppo.kl_coef` if `objective/kl` stays near 0",
        ),
    )


def reward_spread(run: Run) -> Iterator[Finding]:
    """Check whether rewards still tell completions apart."""
    curve = run.curve("objective/scores_std")
    if not len(curve):
        return
    last = curve.last()
    if last.mean <= 1e-6 * max(abs(run.curve("objective/scores").last().mean), 1.0):
        yield Finding(
            "reward spread",
            "bad",
            f"all completions of a step get the same reward ({last.when})",
            "the reward is constant, clipped or at its limit, so nothing can be learned from it",
            (
                "look at the completions (`ppo.show_steps`) and their rewards",
                "raise or drop `ppo.reward_clip`; check `ppo.missing_eos_reward`, which may replace every reward",
            ),
            last.span,
        )
    elif len(curve) >= MIN_STEPS and last.mean < SPREAD_GONE * curve.first().mean:
        yield Finding(
            "reward spread",
            "look",
            f"the rewards of a step hardly differ: standard deviation {curve.first().mean:.3f} "
            f"({curve.first().when}) to {last.mean:.3f} ({last.when})",
            "the reward is at its limit, or all completions have become similar",
            ("stop earlier (`ppo.steps`), or use a reward that can still tell good completions from better ones",),
            last.span,
        )


def held_out(run: Run) -> Iterator[Finding]:
    """Check whether the reward of held-out prompts rises too."""
    evaluated, trained = run.evaluated("eval/objective/scores"), run.curve("objective/scores")
    if len(evaluated) < 3 or len(trained) < MIN_STEPS or trained.trend.certainty < CERTAIN:
        return
    rise = trained.last().mean - trained.first(0.1).mean
    if rise <= 0:
        return
    last = evaluated.last(0.25, least=2)
    gained = last.mean - evaluated.values[0]
    best = max(evaluated, key=lambda point: point[1])
    seen = f"reward rises by {rise:.2f} in training and by {gained:.2f} on held-out prompts"
    lost = best[1] - last.mean
    change = (
        "keep the best policy within a budget: `ppo.kl_budget` with `ppo.eval_steps`",
        "raise `ppo.kl_coef`, or stop earlier (`ppo.steps`, `ppo.kl_stop`)",
        "train on more prompts, or on an ensemble of rewards (`ppo.reward_combination`)",
    )
    if gained < FOLLOWS * rise:
        means = "the policy memorizes its prompts, or what it learns does not generalize"
        yield Finding("held-out reward", "look", f"{seen} ({last.when})", means, change, evaluated.span)
    elif lost > 0.5 * rise:
        means = "over-optimization: past its best step, the policy exploits errors of the reward"
        at_best = f"it was best after step {best[0]:,} ({best[1]:.2f}) and is {last.mean:.2f} at the end"
        yield Finding("held-out reward", "look", f"{seen}: {at_best}", means, change, (best[0], evaluated.steps[-1]))


def kl(run: Run) -> Iterator[Finding]:
    """Check whether the policy stays near the SFT model."""
    curve = run.curve("objective/kl")
    if not len(curve):
        return
    yield from _kl_negative(curve)
    last = curve.last()
    change = ("raise `ppo.kl_coef`", "set a target (`ppo.kl_target`) or a bound (`ppo.kl_stop`, `ppo.kl_budget`)")
    if last.mean > KL_FAR:
        severity: Severity = "bad" if last.mean > KL_TOO_FAR else "look"
        means = "the KL penalty is too small: this far away, the reward model scores texts unlike its training data"
        seen = f"{last.mean:.1f} nats per completion ({last.when})"
        yield Finding("KL", severity, seen, means, (*change, "lower `ppo.learning_rate`"), last.span)
    elif _grows_without_end(curve):
        half = curve.last(0.5)
        seen = f"still growing at {last.mean:.1f} nats per completion: {100 * half.trend.slope:+.1f} per 100 steps"
        means = "the KL penalty does not bound the policy yet: in a longer run the KL would keep growing at this rate"
        yield Finding("KL", "look", f"{seen} ({half.when})", means, change, half.span)
    elif len(curve) >= MIN_STEPS:
        yield Finding("KL", "fine", f"{last.mean:.1f} nats per completion at the end", steps=last.span)


def _kl_negative(curve: Curve) -> Iterator[Finding]:
    for block in curve.blocks(10):
        if block.mean < KL_NEGATIVE and block.mean + 4.0 * block.error < 0.0:
            yield Finding(
                "KL",
                "bad",
                f"negative: {block.mean:.2f} nats per completion over {block.when}",
                "a KL is never negative: this estimate is, because completions were not sampled from the distribution "
                "whose log-probabilities are computed, or because the passes differ numerically",
                (
                    "compute in float32: `--set model.precision=float32 --set model.dtype=float32`",
                    "check that `ppo.model` is the SFT model the run started from; otherwise please report it as a bug",
                ),
                block.span,
            )
            return


def _grows_without_end(curve: Curve) -> bool:
    """Whether the second half of the run adds at least as much KL as the first."""
    if len(curve) < 2 * MIN_STEPS or curve.last().mean < KL_SETTLED:
        return False
    half = curve.last(0.5)
    before, middle, after = curve.first().mean, curve.first(0.6).last(1 / 3).mean, curve.last().mean
    return half.trend.certainty > CERTAIN and after - middle >= middle - before


def entropy(run: Run) -> Iterator[Finding]:
    """Check whether the policy keeps its entropy."""
    curve = run.curve("policy/entropy_avg")
    if len(curve) < MIN_STEPS or curve.first().mean <= 0:
        return
    first, last = curve.first(), curve.last()
    share = last.mean / first.mean
    if share < ENTROPY_LOW:
        yield Finding(
            "entropy",
            "bad" if share < ENTROPY_COLLAPSED else "look",
            f"falls to {percent(share)} of what it was: {first.mean:.3f} to {last.mean:.3f} nats per token "
            f"({last.when})",
            "the policy gives almost the same completion to every prompt, and stops exploring",
            (
                "raise `ppo.kl_coef`, or add `ppo.entropy_coef` (0.001 to 0.01)",
                "lower `ppo.learning_rate` or `ppo.epochs`",
                "look at the completions: `ppo.show_steps`",
            ),
            last.span,
        )


def length(run: Run) -> Iterator[Finding]:
    """Check whether completions become much longer or shorter."""
    curve = run.curve("length/mean")
    if len(curve) < MIN_STEPS or curve.first().mean <= 0:
        return
    first, last = curve.first(), curve.last()
    factor = last.mean / first.mean
    seen = f"{first.mean:.0f} tokens ({first.when}) to {last.mean:.0f} ({last.when})"
    if factor > LONGER:
        means = "the reward prefers long completions, whatever their content"
        change = (
            "subtract `ppo.length_penalty` per token",
            "set `ppo.missing_eos_reward` or `ppo.missing_eos_penalty`",
        )
        severity: Severity = "bad" if factor > MUCH_LONGER else "look"
        yield Finding("length", severity, f"grows without bound: {seen}", means, change, last.span)
    elif factor < SHORTER:
        means = "the reward prefers short completions, or each token costs too much KL"
        change = ("set a negative `ppo.length_penalty`, which favors long completions", "lower `ppo.kl_coef`")
        severity: Severity = "bad" if factor < MUCH_SHORTER else "look"
        yield Finding("length", severity, f"collapses: {seen}", means, change, last.span)
    else:
        yield Finding("length", "fine", seen, steps=curve.span)


def ended(run: Run) -> Iterator[Finding]:
    """Check whether completions finish."""
    completions, curve = run.completions_per_step, run.curve("val/num_eos_tokens")
    if not completions or not len(curve):
        return
    first, last = curve.first().mean / completions, curve.last().mean / completions
    fell = first - last > 0.3
    if last < ENDED_HALF or fell:
        yield Finding(
            "end tokens",
            "bad" if last < ENDED_HARDLY else "look",
            f"{percent(last)} of the completions finish ({curve.last().when}); {percent(first)} did at the start",
            "completions are cut off: the limit is too low, the model uses another stop token, or rewards prefer it",
            (
                "set `ppo.missing_eos_reward` (-1 with normalized rewards), or `ppo.missing_eos_penalty`",
                "raise `ppo.max_new_tokens`, or add the stop token to `ppo.stop_tokens`",
            ),
            curve.last().span,
        )


COMPLETION_RULES: tuple[Callable[[Run], Iterator[Finding]], ...] = (
    reward,
    reward_spread,
    held_out,
    kl,
    entropy,
    length,
    ended,
)
