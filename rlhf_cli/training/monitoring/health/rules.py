"""Health rules about the answers of a run: their reward, distance, variety and length. See docs/health.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rlhf_cli.training.monitoring.curves import Curve
from rlhf_cli.training.monitoring.health.findings import MIN_STEPS, STEP_LARGE, Finding, Run, Severity

CERTAIN = 3.0
"""Standard errors from which a slope or a difference is taken for more than noise."""
LIKELY = 2.0
KL_FAR, KL_TOO_FAR = 30.0, 50.0
"""Nats an answer."""
KL_SETTLED = 10.0
"""Nats an answer below which a KL that still grows is no matter."""
KL_NEGATIVE = -0.1
"""Nats an answer: below this, over a block of steps, the estimate's own noise is no explanation."""
ENTROPY_LOW, ENTROPY_COLLAPSED = 0.2, 0.05
"""Shares of the entropy at the start."""
LONGER, MUCH_LONGER = 2.0, 4.0
SHORTER, MUCH_SHORTER = 0.4, 0.15
"""Factors on the length at the start."""
ENDED_HALF, ENDED_HARDLY = 0.5, 0.1
"""Shares of answers that end of themselves."""
SPREAD_GONE = 0.05
"""Share of the rewards' standard deviation at the start."""
FOLLOWS = 0.25
"""Least share of the training reward's rise that held-out prompts should show."""


def reward(run: Run) -> Iterator[Finding]:
    """Whether the reward rises beyond its noise."""
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
            "steps are too large for what the critic knows, or the penalties outweigh the reward",
            (
                "lower `ppo.learning_rate`, or give the critic a lead with `ppo.critic_warmup_steps`",
                "lower `ppo.kl_coef`, `ppo.missing_eos_penalty` or `ppo.length_penalty` if they are large",
            ),
            curve.span,
        )
    elif trend.certainty < LIKELY and rise < LIKELY * noise:
        means, change = _no_rise(run)
        seen = f"does not rise beyond its noise: {seen}; {slope}"
        yield Finding("reward", "look", seen, means, change, curve.span)
    else:
        yield Finding("reward", "fine", f"rises: {seen}", steps=curve.span)


def _no_rise(run: Run) -> tuple[str, tuple[str, ...]]:
    """What a reward that stays where it is means, which depends on the size of the updates."""
    if run.curve("policy/approxkl_avg").mean > STEP_LARGE:
        return (
            "updates are too large to learn from: what one gains, the next undoes",
            ("lower `ppo.learning_rate`; see `update`",),
        )
    return (
        "the learning rate is too small, a step has too few answers for so noisy a reward, the leash is too short, "
        "or the reward cannot tell these answers apart",
        (
            "raise `ppo.learning_rate` while `policy/approxkl_avg` is under 0.02",
            "raise `ppo.prompts_per_step`, or `ppo.steps`",
            "lower `ppo.kl_coef` if `objective/kl` stays near 0",
        ),
    )


def reward_spread(run: Run) -> Iterator[Finding]:
    """Whether rewards still tell answers apart."""
    curve = run.curve("objective/scores_std")
    if not len(curve):
        return
    last = curve.last()
    if last.mean <= 1e-6 * max(abs(run.curve("objective/scores").last().mean), 1.0):
        yield Finding(
            "reward spread",
            "bad",
            f"all answers of a step get the same reward ({last.when})",
            "a reward that is constant, clipped or at its limit: nothing can be learned from it",
            (
                "look at the answers (`ppo.show_steps`) and at what the reward gives them",
                "raise or drop `ppo.reward_clip`; check `ppo.missing_eos_reward`, which may replace every reward",
            ),
            last.span,
        )
    elif len(curve) >= MIN_STEPS and last.mean < SPREAD_GONE * curve.first().mean:
        yield Finding(
            "reward spread",
            "look",
            f"the rewards of a step hardly differ any more: standard deviation {curve.first().mean:.3f} "
            f"({curve.first().when}) to {last.mean:.3f} ({last.when})",
            "the reward is at its limit, or all answers have become alike",
            ("end earlier (`ppo.steps`), or take a reward that goes on telling good answers from better ones",),
            last.span,
        )


def held_out(run: Run) -> Iterator[Finding]:
    """Whether prompts that nothing trains on gain as well."""
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
        "raise `ppo.kl_coef`, or end earlier (`ppo.steps`, `ppo.kl_stop`)",
        "train on more prompts, or on an ensemble of rewards (`ppo.reward_combination`)",
    )
    if gained < FOLLOWS * rise:
        means = "the policy learns these prompts by heart, or what it learns does not carry over"
        yield Finding("held-out reward", "look", f"{seen} ({last.when})", means, change, evaluated.span)
    elif lost > 0.5 * rise:
        means = "over-optimization: beyond its best, the policy exploits what the reward gets wrong"
        at_best = f"it was best after step {best[0]:,} ({best[1]:.2f}) and is {last.mean:.2f} at the end"
        yield Finding("held-out reward", "look", f"{seen}: {at_best}", means, change, (best[0], evaluated.steps[-1]))


def kl(run: Run) -> Iterator[Finding]:
    """Whether the policy stays near the SFT model."""
    curve = run.curve("objective/kl")
    if not len(curve):
        return
    yield from _kl_negative(curve)
    last = curve.last()
    leash = ("raise `ppo.kl_coef`", "steer it with `ppo.kl_target`, or bound it with `ppo.kl_stop` or `ppo.kl_budget`")
    if last.mean > KL_FAR:
        severity: Severity = "bad" if last.mean > KL_TOO_FAR else "look"
        means = "the leash is loose: so far from the SFT model, the reward model judges texts it has never seen"
        seen = f"{last.mean:.1f} nats an answer ({last.when})"
        yield Finding("KL", severity, seen, means, (*leash, "lower `ppo.learning_rate`"), last.span)
    elif _grows_without_end(curve):
        half = curve.last(0.5)
        seen = f"still growing at {last.mean:.1f} nats an answer: {100 * half.trend.slope:+.1f} per 100 steps"
        means = "nothing holds the policy yet: a longer run would go further away at the same speed"
        yield Finding("KL", "look", f"{seen} ({half.when})", means, leash, half.span)
    elif len(curve) >= MIN_STEPS:
        yield Finding("KL", "fine", f"{last.mean:.1f} nats an answer at the end", steps=last.span)


def _kl_negative(curve: Curve) -> Iterator[Finding]:
    for block in curve.blocks(10):
        if block.mean < KL_NEGATIVE and block.mean + 4.0 * block.error < 0.0:
            yield Finding(
                "KL",
                "bad",
                f"negative: {block.mean:.2f} nats an answer over {block.when}",
                "a KL is never negative, but its estimate is when answers come from another distribution than the one "
                "whose log-probabilities are taken, or when the passes differ numerically",
                (
                    "compute in float32: `--set model.precision=float32 --set model.dtype=float32`",
                    "check that `ppo.model` is the SFT model the run started from; otherwise please report it as a bug",
                ),
                block.span,
            )
            return


def _grows_without_end(curve: Curve) -> bool:
    """Whether the second half of the run adds at least as much as the first."""
    if len(curve) < 2 * MIN_STEPS or curve.last().mean < KL_SETTLED:
        return False
    half = curve.last(0.5)
    before, middle, after = curve.first().mean, curve.first(0.6).last(1 / 3).mean, curve.last().mean
    return half.trend.certainty > CERTAIN and after - middle >= middle - before


def entropy(run: Run) -> Iterator[Finding]:
    """Whether the policy still has several things to say."""
    curve = run.curve("policy/entropy_avg")
    if len(curve) < MIN_STEPS or curve.first().mean <= 0:
        return
    first, last = curve.first(), curve.last()
    share = last.mean / first.mean
    if share < ENTROPY_LOW:
        yield Finding(
            "entropy",
            "bad" if share < ENTROPY_COLLAPSED else "look",
            f"falls to {share:.0%} of what it was: {first.mean:.3f} to {last.mean:.3f} nats a token ({last.when})",
            "the policy says nearly the same to everything, and stops exploring",
            (
                "raise `ppo.kl_coef`, or add `ppo.entropy_coef` (0.001 to 0.01)",
                "lower `ppo.learning_rate` or `ppo.epochs`",
                "look at the answers: `ppo.show_steps`",
            ),
            last.span,
        )


def length(run: Run) -> Iterator[Finding]:
    """Whether answers grow or shrink out of bounds."""
    curve = run.curve("length/mean")
    if len(curve) < MIN_STEPS or curve.first().mean <= 0:
        return
    first, last = curve.first(), curve.last()
    factor = last.mean / first.mean
    seen = f"{first.mean:.0f} tokens ({first.when}) to {last.mean:.0f} ({last.when})"
    if factor > LONGER:
        means = "the reward likes long answers, whatever they say"
        change = (
            "subtract `ppo.length_penalty` per token",
            "set `ppo.missing_eos_reward` or `ppo.missing_eos_penalty`",
        )
        severity: Severity = "bad" if factor > MUCH_LONGER else "look"
        yield Finding("length", severity, f"runs away: {seen}", means, change, last.span)
    elif factor < SHORTER:
        means = "the reward likes short answers, or each token costs too much KL"
        change = ("a negative `ppo.length_penalty` favors long answers", "lower `ppo.kl_coef`")
        severity: Severity = "bad" if factor < MUCH_SHORTER else "look"
        yield Finding("length", severity, f"collapses: {seen}", means, change, last.span)
    else:
        yield Finding("length", "fine", seen, steps=curve.span)


def ended(run: Run) -> Iterator[Finding]:
    """Whether answers end of themselves."""
    answers, curve = run.answers_per_step, run.curve("val/num_eos_tokens")
    if not answers or not len(curve):
        return
    first, last = curve.first().mean / answers, curve.last().mean / answers
    fell = first - last > 0.3
    if last < ENDED_HALF or fell:
        yield Finding(
            "end tokens",
            "bad" if last < ENDED_HARDLY else "look",
            f"{last:.0%} of the answers end of themselves ({curve.last().when}); {first:.0%} did at the start",
            "answers are cut off: there is too little room, the model knows another end, or the reward likes them so",
            (
                "set `ppo.missing_eos_reward` (-1 with normalized rewards), or `ppo.missing_eos_penalty`",
                "raise `ppo.max_new_tokens`, or name the end in `ppo.stop_tokens`",
            ),
            curve.last().span,
        )


ANSWER_RULES: tuple[Callable[[Run], Iterator[Finding]], ...] = (
    reward,
    reward_spread,
    held_out,
    kl,
    entropy,
    length,
    ended,
)
