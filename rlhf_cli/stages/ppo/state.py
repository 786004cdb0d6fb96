"""What a PPO run remembers from step to step, beside weights, optimizer and random states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlhf_cli.objectives.shaping import RunningMoments
from rlhf_cli.training.monitoring.detectors.observation import DetectorState


@dataclass(frozen=True)
class Best:
    """The best policy within the KL budget so far.

    Attributes:
        step: steps it was trained for.
        reward: mean over held-out prompts, as it is trained for.
        kl: nats per completion.
    """

    step: int
    reward: float
    kl: float


@dataclass
class RunState:
    """PPO's part of a checkpoint.

    Attributes:
        kl_coef: beta of the next step.
        moments: of all rewards so far.
        best: the best policy within the KL budget, if any was evaluated.
        ended: why the run ended before its last step, or "".
        detectors: what the detectors remember.
    """

    kl_coef: float
    moments: RunningMoments = field(default_factory=RunningMoments)
    best: Best | None = None
    ended: str = ""
    detectors: DetectorState = field(default_factory=DetectorState)

    @staticmethod
    def of(state: dict[str, Any]) -> RunState:
        """Inverse of `dataclasses.asdict`."""
        best = None if state["best"] is None else Best(**state["best"])
        detectors = DetectorState(**state.get("detectors", {}))
        known = {"moments": RunningMoments(**state["moments"]), "best": best, "detectors": detectors}
        fields: dict[str, Any] = {**state, **known}
        return RunState(**fields)
