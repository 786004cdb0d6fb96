"""What detectors see of a step, what they remember, and what they report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rlhf_cli.plain_text import printable

WINDOW = 3
"""Steps whose mean a detector judges; as many at the start are what it compares with."""
QUOTED = 3
"""Completions that a detection quotes."""
_EXCERPT = 200
"""Characters of a quoted prompt or completion."""

Status = Literal["quiet", "warn", "stop"]


@dataclass(frozen=True)
class Observation:
    """The completions of a step.

    Attributes:
        step: 1-based.
        prompts: N prompts as text.
        texts: N completions.
        lengths: N numbers of tokens.
        scores: N rewards, before penalties; finite.
        kl: N sums of log pi / pi_ref over the tokens of a completion, in nats.
        parts: reward -> N scores before weighting.
        metrics: of the step, those of an evaluation after it included.
    """

    step: int
    prompts: Sequence[str]
    texts: Sequence[str]
    lengths: Sequence[int]
    scores: Sequence[float]
    kl: Sequence[float]
    parts: Mapping[str, Sequence[float]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def quotes(self, badness: Sequence[float]) -> list[Quote]:
        """Return the worst completions, each of another prompt; none with a badness of minus infinity."""
        found: list[Quote] = []
        for row in sorted(range(len(self.texts)), key=lambda row: -badness[row]):
            if badness[row] == -math.inf:
                break
            prompt, text = _excerpt(self.prompts[row]), _excerpt(self.texts[row])
            quote = Quote(prompt, text, self.scores[row], self.kl[row], self.lengths[row])
            if all(quote.prompt != other.prompt for other in found):
                found.append(quote)
            if len(found) == QUOTED:
                break
        return found


@dataclass(frozen=True)
class Quote:
    """A completion as evidence: shortened, without control characters, and the values of `ShownCompletion`."""

    prompt: str
    completion: str
    score: float
    kl: float
    tokens: int


@dataclass(frozen=True)
class Detection:
    """A detector that changed its state.

    Attributes:
        step: in which it did.
        detector: its name in `ppo.detectors`.
        status: its new state.
        value: what it measured.
        threshold: that was passed; None for `quiet`.
        seen: in words.
        completions: evidence.
    """

    step: int
    detector: str
    status: Status
    value: float
    threshold: float | None
    seen: str
    completions: Sequence[Quote] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the line of `detections.jsonl`."""
        return asdict(self)


@dataclass
class DetectorState:
    """What detectors remember from step to step; part of a checkpoint.

    Attributes:
        steps: observed.
        step: the last of them, 1-based.
        first: quantity -> its values in the first `WINDOW` steps that had one.
        recent: quantity -> its last `WINDOW` values.
        phrases: phrase, with spaces between its words -> its mean share in the first steps.
        paid: phrase, in the same form -> sums over steps of the variation, within a step, of having it, and of its
            covariation with the reward, both times the number of completions.
        variation: the same sum for the reward.
        phrase: that pays the most and rose the most in the last step, in the same form.
        phrase_share: its share in that step.
        common_share: share of the most common phrase of that step.
        best: reward -> its best value, and the training reward then, if something was trained before.
        value: detector -> the last value that it compared with its thresholds.
        seen: detector -> that value in words.
        status: detector -> its state; without one, it is quiet.
        safe_step: steps of the checkpoint before the first detector warned; None where none does.
    """

    steps: int = 0
    step: int = 0
    first: dict[str, list[float]] = field(default_factory=dict)
    recent: dict[str, list[float]] = field(default_factory=dict)
    phrases: dict[str, float] = field(default_factory=dict)
    paid: dict[str, list[float]] = field(default_factory=dict)
    variation: float = 0.0
    phrase: str = ""
    phrase_share: float = 0.0
    common_share: float = 0.0
    best: dict[str, list[float]] = field(default_factory=dict)
    value: dict[str, float] = field(default_factory=dict)
    seen: dict[str, str] = field(default_factory=dict)
    status: dict[str, Status] = field(default_factory=dict)
    safe_step: int | None = None

    def add(self, quantity: str, value: float) -> None:
        """Remember a value."""
        first = self.first.setdefault(quantity, [])
        if len(first) < WINDOW:
            first.append(value)
        self.recent[quantity] = [*self.recent.get(quantity, []), value][-WINDOW:]

    def start(self, quantity: str) -> float | None:
        """Mean of the first steps; None before they are over."""
        return _mean(self.first.get(quantity, []))

    def now(self, quantity: str) -> float | None:
        """Mean of the last steps; None before there are enough."""
        return _mean(self.recent.get(quantity, []))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if len(values) == WINDOW else None


def _excerpt(text: str) -> str:
    plain = " ".join(printable(text).split())
    return plain if len(plain) <= _EXCERPT else f"{plain[:_EXCERPT].rstrip()}..."
