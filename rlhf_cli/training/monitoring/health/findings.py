"""The input and output of health rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rlhf_cli.training.monitoring.curves import Curve

Severity = Literal["fine", "look", "bad"]
"""`look`: worth a look, may be intended. `bad`: do not trust this run as it is."""

MIN_STEPS = 10
"""Fewest steps for which trends are judged: with fewer, a fitted line says little."""

STEP_LARGE = 0.05
"""Approximate KL of an update, in nats per token, above which it is too large."""


@dataclass(frozen=True)
class Finding:
    """One observation about a run.

    Attributes:
        subject: its topic, in a word or two.
        severity: how bad it is.
        seen: values and steps.
        means: what it usually means; empty where all is well.
        change: what to change, with the names of settings.
        steps: first and last step in which it was seen.
        completions: that show it, as in `detections.jsonl`.
    """

    subject: str
    severity: Severity
    seen: str
    means: str = ""
    change: tuple[str, ...] = ()
    steps: tuple[int, int] = (0, 0)
    completions: tuple[Mapping[str, Any], ...] = ()

    def with_evidence(self, other: Finding | None) -> Finding:
        """Return this finding with the severity of another one if that is worse, and with its completions."""
        if other is None:
            return self
        severity = "bad" if "bad" in (self.severity, other.severity) else self.severity
        return replace(self, severity=severity, completions=other.completions)

    def as_json(self) -> dict[str, Any]:
        """Return the form in `health.json`."""
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """The steps of a run.

    Attributes:
        rows: rows of `metrics.jsonl`, without the evaluation before training.
        start: row of the evaluation before training, if there is one.
    """

    rows: tuple[Mapping[str, Any], ...]
    start: Mapping[str, Any] | None = None

    @staticmethod
    def of(rows: Sequence[Mapping[str, Any]]) -> Run:
        """Make a run from all its rows."""
        return Run(tuple(row for row in rows if row["step"] > 0), next((row for row in rows if row["step"] == 0), None))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def span(self) -> tuple[int, int]:
        """First and last step."""
        return (self.rows[0]["step"], self.rows[-1]["step"]) if self.rows else (0, 0)

    def curve(self, name: str) -> Curve:
        """Return a metric over the steps."""
        return Curve.of(self.rows, name)

    def evaluated(self, name: str) -> Curve:
        """Return a metric of the evaluations, including the one before training."""
        return Curve.of([*([] if self.start is None else [self.start]), *self.rows], name)

    @property
    def completions_per_step(self) -> float | None:
        """Completions sampled per step, from the count of episodes."""
        episodes = self.curve("episode")
        return episodes.values[-1] / episodes.steps[-1] if len(episodes) else None

    @property
    def moves_ratio(self) -> bool:
        """Whether an update has several optimizer steps: only then does the ratio move away from 1 within it."""
        steps = self.curve("policy/optimizer_steps")
        return max(steps.values) > 1 if len(steps) else self.reuses_completions

    @property
    def reuses_completions(self) -> bool:
        """Whether an update has several epochs, of which the first can be compared with all."""
        epochs = self.curve("policy/epochs")
        if len(epochs):
            return max(epochs.values) > 1
        first, whole = self.curve("val/first_epoch_approxkl"), self.curve("policy/approxkl_avg")
        return first.values != whole.values
