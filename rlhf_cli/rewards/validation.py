"""Rewards come from code and servers of others, and are not trusted to answer well: what is wrong names the sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, cast

from rlhf_cli.data.records import Prompt, prompt_text
from rlhf_cli.errors import DataError
from rlhf_cli.rewards.base import Reward

_SHOWN = 60


def finite_scores(reward: Reward, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """The scores of a reward, for work that has no use for anything but numbers: labeling and evaluation.

    PPO can do without a step, so `CombinedReward` lets NaN through instead.

    Raises:
        DataError: a score is NaN or infinite; names the first sample.
    """
    scores = reward.score(prompts, completions)
    if (bad := first_not_finite(scores)) is not None:
        raise DataError(
            f"the reward `{reward.name}` returned {scores[bad]}, which is not finite, for "
            f"{sample(prompts[bad], completions[bad])}",
            hint="return a finite float for every completion, an empty one too",
        )
    return scores


def first_not_finite(scores: Sequence[float]) -> int | None:
    """Place of the first NaN or infinity."""
    return next((place for place, score in enumerate(scores) if not math.isfinite(score)), None)


def numbers(who: str, scores: Sequence[Any], prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """What somebody returned as floats, one for each answer; NaN and infinity pass.

    Args:
        who: returned it, for messages.
        scores: as they came.
        prompts: N.
        completions: N.

    Raises:
        DataError: too many, too few, or what is no number; names the sample.
    """
    if len(scores) != len(completions):
        first = f", the first of which answers {shown(prompt_text(prompts[0]))}" if prompts else ""
        raise DataError(
            f"{who} returned {len(scores)} scores for {len(completions)} completions{first}",
            hint="return one float for each completion, in their order",
        )
    found = []
    for score, prompt, completion in zip(scores, prompts, completions, strict=True):
        number = _number(score)
        if number is None:
            raise DataError(
                f"{who} returned {shown(score)}, which is not a number, for {sample(prompt, completion)}",
                hint="return a finite float for every completion, an empty one too",
            )
        found.append(number)
    return found


def _number(value: Any) -> float | None:
    """A float of any kind of number, NumPy's and torch's scalars too; a string of digits is a mistake."""
    number = value.item() if hasattr(value, "item") and getattr(value, "shape", None) in ((), None) else value
    if not isinstance(number, Real):
        return None
    try:
        return float(number)
    except OverflowError:  # a whole number beyond what a float holds
        return math.inf if cast(float, number) > 0 else -math.inf


def sample(prompt: Prompt, completion: str) -> str:
    """Prompt and completion, shortened, for messages."""
    return f"the prompt {shown(prompt_text(prompt))} and the completion {shown(completion)}"


def shown(value: object) -> str:
    """A value as Python writes it, shortened; control characters are escaped by that."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
