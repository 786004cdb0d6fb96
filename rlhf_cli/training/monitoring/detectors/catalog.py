"""The detectors: how each puts what it measured into words, and what to try. docs/health.md explains the thresholds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Detector:
    """One detector.

    Attributes:
        name: in `ppo.detectors`, and of its metric `detectors/NAME`.
        subject: of its finding; a health rule with the same subject judges the same quantity.
        seen: what it measured, with the fields `value` (compared with the thresholds), `start` and `now` (of the
            quantity itself, in the first and in the last steps) and `what`.
        means: what it usually means.
        change: what to try.
        compared: how `value` comes from `now` and `start`: `now` itself, their share, the factor between them in
            either direction, or their difference.
    """

    name: str
    subject: str
    seen: str
    means: str
    change: tuple[str, ...]
    compared: Literal["now", "share", "factor", "rise"] = "now"


_HOLD = "raise `ppo.kl_coef`, or write the best policy within a budget: `ppo.kl_budget` with `ppo.eval_steps`"
_FUNCTION = "bound what the reward pays for one feature, and score the quoted completions by hand"

DETECTORS: tuple[Detector, ...] = (
    Detector(
        "kl",
        "KL",
        "{now:.1f} nats per completion",
        "the KL penalty is too small: this far away, the reward scores texts unlike any it was made for",
        (_HOLD, "lower `ppo.learning_rate`"),
    ),
    Detector(
        "length",
        "length",
        "completions have {now:.0f} tokens, {start:.0f} at the start",
        "the reward pays for length, or for brevity, whatever the content",
        ("set `ppo.length_penalty`", "set `ppo.missing_eos_reward` or `ppo.missing_eos_penalty`", _FUNCTION),
        "factor",
    ),
    Detector(
        "entropy",
        "entropy",
        "falls to {value:z.1%} of what it was: {start:.3f} to {now:.3f} nats per token",
        "the policy gives almost the same completion to every prompt, and stops exploring",
        ("raise `ppo.kl_coef`, or add `ppo.entropy_coef` (0.001 to 0.01)", "lower `ppo.learning_rate` or `ppo.epochs`"),
        "share",
    ),
    Detector(
        "reward_spread",
        "reward spread",
        "the rewards of a step hardly differ: standard deviation {start:.3f} at the start, now {now:.3f}",
        "the reward is at its limit, or all completions have become similar: little is left to learn from it",
        ("stop earlier (`ppo.steps`)", "use a reward that can still tell good completions from better ones"),
        "share",
    ),
    Detector(
        "reward_range",
        "reward range",
        "{now:z.1%} of the rewards are outside {what}, the range of the held-out rankings",
        "the reward model extrapolates: its accuracy was measured on completions with other rewards",
        (_HOLD, "label completions of this policy and train the reward model on them too"),
    ),
    Detector(
        "phrase",
        "phrase",
        '"{what}" is rewarded, and is in completions of {now:z.1%} of the prompts ({start:z.1%} at the start)',
        "the reward pays for a phrase, which the policy then gives to every prompt",
        (_FUNCTION, "raise `ppo.kl_coef`", "label such completions as bad and train the reward model on them too"),
    ),
    Detector(
        "repetition",
        "repetition",
        "{now:z.1%} of the sequences of four words repeat an earlier one of their completion, {start:z.1%} at the "
        "start",
        "the reward counts something that repetition multiplies",
        (_FUNCTION, "raise `ppo.kl_coef`"),
        "rise",
    ),
    Detector(
        "length_correlation",
        "reward and length",
        "reward and length of the completions of a step are correlated: {now:.2f}",
        "the reward is mostly a function of length",
        ("set `ppo.length_penalty`", "compare the accuracy of the reward model with `rm/always_longer`"),
    ),
    Detector(
        "disagreement",
        "ensemble",
        "the rewards of an ensemble differ {value:.1f} times as much as at the start: {start:.2f} to {now:.2f}",
        "the policy has found completions on which some members are wrong",
        ("use `ppo.reward_combination: min` or `mean-std`", _HOLD),
        "share",
    ),
    Detector(
        "held_out",
        "held-out reward",
        "the held-out reward fell to {now:.2f} from {start:.2f} at its best, while the training reward did not",
        "what the policy learns does not generalize to other prompts",
        (_HOLD, "train on more prompts, or stop earlier (`ppo.steps`)"),
    ),
    Detector(
        "gold",
        "gold reward",
        "`{what}` fell to {now:.2f} from {start:.2f} at its best, while the training reward did not",
        "over-optimization: the policy exploits errors of the reward that it is trained on",
        (_HOLD, "stop earlier (`ppo.steps`)", "combine several rewards (`ppo.reward_combination: min`)"),
    ),
)

BY_NAME = {detector.name: detector for detector in DETECTORS}
