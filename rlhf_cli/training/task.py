"""What a stage tells the training loop: one step of its training, its weights, and hooks around a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.errors import RLHFError
from rlhf_cli.models.split_weights import restore
from rlhf_cli.training.monitoring.run_logger import RunLogger
from rlhf_cli.training.monitoring.timing_log import Work
from rlhf_cli.training.timing import StepWatch


@dataclass(frozen=True)
class StepReport:
    """What one step came to.

    Attributes:
        metrics: name -> value, for the metrics log.
        note: the values that matter most, for the progress bar.
        skipped: optimizer steps that were skipped.
        of: optimizer steps there were to take.
        fault: why they were skipped.
        hint: what to do about `fault`; empty takes the loop's own hint.
        histograms: name -> values, for the metrics log.
        work: phase -> what it did, for throughput.
        episodes: completions that were sampled and trained on.
    """

    metrics: dict[str, float]
    note: str = ""
    skipped: int = 0
    of: int = 1
    fault: str = "losses or gradients were not finite"
    hint: str = ""
    histograms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    work: Mapping[str, Work] = field(default_factory=dict)
    episodes: int = 0


class TrainingTask(ABC):
    """What a stage trains.

    Attributes:
        optimizer: its state is saved and restored.
        phases: phases of a step in their order -> a guess of their relative durations.
        alike: phases among them that do the same kind of work.
    """

    optimizer: torch.optim.Optimizer
    phases: Mapping[str, float] = {"update": 1.0}
    alike: Collection[str] = ()

    @abstractmethod
    def scale_learning_rates(self, factor: float) -> None:
        """Put a factor on all learning rates, in place of the one before: 1, or 0.5 after a roll-back."""

    @abstractmethod
    def step(self, step: int, watch: StepWatch | None = None) -> StepReport:
        """Run the 0-based step `step`, timed by `watch`. May raise `DivergedError`, on which the loop rolls back."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Return the trained weights by name."""

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy saved weights, among other tensors, into the trained ones."""
        restore(self.weights(), tensors)

    def extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside weights and optimizer, as JSON can express it."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:  # noqa: B027  (optional)
        """Restore what `extra_state` returned; called on resuming and on rolling back."""

    @property
    def has_ended(self) -> bool:
        """Whether training ends before its last step."""
        return False

    @property
    def halt(self) -> RLHFError | None:
        """Why training must not go on after the last step; it is saved and raised. Asked on resuming too."""
        return None

    @property
    def kept_steps(self) -> Collection[int]:
        """Steps whose checkpoints stay, however old."""
        return ()

    def before_first_step(self, log: RunLogger, watch: StepWatch) -> None:  # noqa: B027  (optional)
        """Called once per run, before anything is trained or saved."""

    def after_step(  # noqa: B027  (optional)
        self, step: int, report: StepReport, log: RunLogger, watch: StepWatch
    ) -> None:
        """Called with the number of steps done, before the report is logged and saved. May add metrics to it, and may
        raise `DivergedError`.
        """

    def after_last_step(self, step: int, log: RunLogger, watch: StepWatch) -> dict[str, float]:
        """Do what follows the last of all steps where `step`, which was not the last when it was taken, has become it.
        Return metrics to add to those of the step.
        """
        return {}
