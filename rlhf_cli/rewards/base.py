"""What a reward is: text in, numbers out, whoever computes them.

Rewards are given prompts and answers as text, never as ids, so each may have a tokenizer of its own (trap 11 of
docs/ppo.md) or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rlhf_cli.data.records import Prompt


class Reward(Protocol):
    """Scores answers. A number that is not finite is handed on: the caller decides what becomes of it."""

    @property
    def name(self) -> str:
        """Short, for messages and metrics."""
        ...

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """One float for each answer, higher is better; NaN where there is no telling.

        Args:
            prompts: N, as text or conversations, one for each answer.
            completions: N answers, as text.

        Raises:
            DataError: no usable answer; says whose, and names the sample where one is to blame.
        """
        ...


@dataclass(frozen=True)
class Scores:
    """What several rewards say of N answers.

    Attributes:
        total: (N,) combined; finite in float32, or NaN.
        parts: name of a reward -> (N,) what it gave, before its weight.
        faults: for each reward that gave what is not finite in float32: which, how often, and for which sample first.
    """

    total: list[float]
    parts: dict[str, list[float]]
    faults: list[str] = field(default_factory=list)
