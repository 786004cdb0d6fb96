"""What a PPO run remembers from step to step, besides weights, optimizer and random states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlhf_cli.objectives.shaping import RunningMoments


@dataclass(frozen=True)
class Best:
    """The best policy under the KL budget so far.

    Attributes:
        step: steps it was trained for.
        reward: mean over held-out prompts, as it is trained for.
        kl: nats per answer.
    """

    step: int
    reward: float
    kl: float


@dataclass
class RunState:
    """What a checkpoint holds besides weights, optimizer and random states.

    Attributes:
        kl_coef: beta of the next step.
        moments: of all rewards so far.
        bad_steps: in a row, just now.
        sound_steps: in which something was learned.
        anchor: step of the last regular checkpoint, which a divergence goes back to. One that a signal left behind is
            none: where a run was stopped must not change where it goes back to.
        rolled_back: training went back to a checkpoint once, and has half the learning rate since.
        best: policy under the KL budget, if any was evaluated.
        ended: why the run ended before its last step, or "".
    """

    kl_coef: float
    moments: RunningMoments = field(default_factory=RunningMoments)
    bad_steps: int = 0
    sound_steps: int = 0
    anchor: int = 0
    rolled_back: bool = False
    best: Best | None = None
    ended: str = ""

    @staticmethod
    def of(state: dict[str, Any]) -> RunState:
        """Inverse of `dataclasses.asdict`."""
        best = None if state["best"] is None else Best(**state["best"])
        fields: dict[str, Any] = {**state, "moments": RunningMoments(**state["moments"]), "best": best}
        return RunState(**fields)
