"""Validate scores that user code and servers return; errors name the sample at fault."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, cast

from rlhf_cli.data.records import Prompt, prompt_text
from rlhf_cli.errors import DataError
from rlhf_cli.rewards.base import NO_COLUMNS, Columns, Reward

_SHOWN = 60


def finite_scores(
    reward: Reward, prompts: Sequence[Prompt], completions: Sequence[str], columns: Columns = NO_COLUMNS
) -> list[float]:
    """Return the scores of a reward, for labeling and evaluation, which need finite numbers.

    PPO uses `CombinedReward`, which lets NaN pass, because PPO can skip a step.

    Raises:
        DataError: a score is NaN or infinite; names the first sample.
    """
    scores = reward.score(prompts, completions, columns)
    if (bad := first_not_finite(scores)) is not None:
        raise DataError(
            f"the reward `{reward.name}` returned {scores[bad]}, which is not finite, for "
            f"{sample(prompts[bad], completions[bad])}",
            hint="return a finite float for every completion, even an empty one",
        )
    return scores


def first_not_finite(scores: Sequence[float]) -> int | None:
    """Return the index of the first NaN or infinity; None if there is none."""
    return next((position for position, score in enumerate(scores) if not math.isfinite(score)), None)


def numbers(origin: str, scores: Sequence[Any], prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """Convert returned scores to floats, one per completion; NaN and infinity pass.

    Args:
        origin: who returned the scores, for messages.
        scores: the returned values.
        prompts: N prompts.
        completions: N completions.

    Raises:
        DataError: there are not N scores, or one is not a number; names the sample.
    """
    if len(scores) != len(completions):
        first = f", the first of them for the prompt {shown(prompt_text(prompts[0]))}" if prompts else ""
        raise DataError(
            f"{origin} returned {len(scores)} scores for {len(completions)} completions{first}",
            hint="return one float per completion, in the same order",
        )
    found = []
    for score, prompt, completion in zip(scores, prompts, completions, strict=True):
        number = _number(score)
        if number is None:
            raise DataError(
                f"{origin} returned {shown(score)}, which is not a number, for {sample(prompt, completion)}",
                hint="return a finite float for every completion, even an empty one",
            )
        found.append(number)
    return found


def _number(value: Any) -> float | None:
    """Convert a number, NumPy or torch scalar to a float; return None for anything else, even a numeric string."""
    number = value.item() if hasattr(value, "item") and getattr(value, "shape", None) in ((), None) else value
    if not isinstance(number, Real):
        return None
    try:
        return float(number)
    except OverflowError:  # an integer too large for a float
        return math.inf if cast(float, number) > 0 else -math.inf


def sample(prompt: Prompt, completion: str) -> str:
    """Describe a prompt and its completion in shortened form, for messages."""
    return f"the prompt {shown(prompt_text(prompt))} and the completion {shown(completion)}"


def shown(value: object) -> str:
    """Return the shortened `repr` of a value, which escapes control characters."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
