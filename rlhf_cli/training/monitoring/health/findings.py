"""What health rules take and give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rlhf_cli.training.monitoring.curves import Curve

Severity = Literal["fine", "look", "bad"]
"""`look`: worth a look, may be as wanted. `bad`: this run is not to be trusted as it is."""

MIN_STEPS = 10
"""Steps from which trends are judged: with fewer, a line through the points says little."""

STEP_LARGE = 0.05
"""Approximate KL of an update in nats a token above which it is too large."""


@dataclass(frozen=True)
class Finding:
    """One thing seen in a run.

    Attributes:
        subject: what it is about, in a word or two.
        severity: how bad that is.
        seen: figures and steps.
        means: what it usually means; empty where all is well.
        change: what to change, settings by name.
        steps: first and last step it was seen in.
    """

    subject: str
    severity: Severity
    seen: str
    means: str = ""
    change: tuple[str, ...] = ()
    steps: tuple[int, int] = (0, 0)

    def as_json(self) -> dict[str, Any]:
        """As it stands in `health.json`."""
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """The steps of a run.

    Attributes:
        rows: of its `metrics.jsonl`, those of steps after the start.
        start: the row of the evaluation before training, if there is one.
    """

    rows: tuple[Mapping[str, Any], ...]
    start: Mapping[str, Any] | None = None

    @staticmethod
    def of(rows: Sequence[Mapping[str, Any]]) -> Run:
        """From all rows."""
        return Run(tuple(row for row in rows if row["step"] > 0), next((row for row in rows if row["step"] == 0), None))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def span(self) -> tuple[int, int]:
        """First and last step."""
        return (self.rows[0]["step"], self.rows[-1]["step"]) if self.rows else (0, 0)

    def curve(self, name: str) -> Curve:
        """A metric over the steps."""
        return Curve.of(self.rows, name)

    def evaluated(self, name: str) -> Curve:
        """A metric of evaluations, the one before training included."""
        return Curve.of([*([] if self.start is None else [self.start]), *self.rows], name)

    @property
    def answers_per_step(self) -> float | None:
        """Answers sampled in a step, from the count of episodes."""
        episodes = self.curve("episode")
        return episodes.values[-1] / episodes.steps[-1] if len(episodes) else None

    @property
    def reuses_answers(self) -> bool:
        """Whether a step's answers are passed more than once: only then does the ratio move away from 1."""
        epochs = self.curve("policy/epochs")
        if len(epochs):
            return max(epochs.values) > 1
        first, whole = self.curve("val/first_epoch_approxkl"), self.curve("policy/approxkl_avg")
        return first.values != whole.values
