"""The interface of rewards: prompts and completions in, one number per completion out.

Rewards receive text, never token ids, so each may use its own tokenizer (trap 11 of docs/ppo.md) or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rlhf_cli.data.records import Prompt


class Reward(Protocol):
    """Scores completions. It may return numbers that are not finite: the caller decides how to handle them."""

    @property
    def name(self) -> str:
        """Short name for messages and metrics."""
        ...

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """Return one float per completion, higher is better; NaN if the reward is unknown.

        Args:
            prompts: N prompts, text or conversations.
            completions: N completions as text, one per prompt.

        Raises:
            DataError: the scores are unusable; names the reward and, if possible, the sample at fault.
        """
        ...


@dataclass(frozen=True)
class Scores:
    """Scores of N completions by several rewards.

    Attributes:
        total: (N,) combined scores; finite in float32, or NaN.
        parts: reward name -> (N,) its scores before weighting.
        faults: one message per reward with scores that are not finite in float32: how many, and the first such sample.
    """

    total: list[float]
    parts: dict[str, list[float]]
    faults: list[str] = field(default_factory=list)
