"""What a run will take, as `rlhf plan` found it: per stage and together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.models.resources import MemoryNeed
from rlhf_cli.pipeline.plan_advice import Advice
from rlhf_cli.pipeline.plan_target import Target
from rlhf_cli.pipeline.prediction import Took
from rlhf_cli.stages.workload import Workload

if TYPE_CHECKING:
    from rlhf_cli.stages.trial import Rates


@dataclass(frozen=True)
class StagePlan:
    """What a stage will take.

    Attributes:
        name: of the stage.
        action: "run", "resume" or "cached"; the others are empty then.
        reason: of the action.
        workload: with completions at their maximum; None where it is not known.
        expected: with completions at the mean that the trial found; None without.
        precision: of matrix products.
        memory: by phase and role; None where it is not known.
        disk: upper bound of the bytes that it writes.
        rates: what the trial measured; None without.
        sizes: derived sizes, as in `recipe show`.
        advice: what to change if it does not fit the memory.
        combined: changes that make it fit together, if none of `advice` does; empty if none do.
        predicted: what each phase takes on other machines; None for this one, where their speed is not known, or where
            the stage does not fit.
        fits: whether the memory suffices, as far as that is known.
    """

    name: str
    action: str
    reason: str
    workload: Workload | None = None
    expected: Workload | None = None
    precision: str = ""
    memory: MemoryNeed | None = None
    disk: int = 0
    rates: Rates | None = None
    sizes: dict[str, int | str] = field(default_factory=dict)
    advice: tuple[Advice, ...] = ()
    combined: tuple[Advice, ...] = ()
    predicted: Mapping[str, Took] | None = None
    fits: bool = True

    @property
    def seconds(self) -> dict[str, float] | None:
        """Seconds of each phase, measured or predicted; None without either, and where the stage does not fit."""
        if not self.fits:
            return None
        if self.predicted is not None:
            return {phase: took.total for phase, took in self.predicted.items()}
        workload = self.expected or self.workload
        return None if self.rates is None or workload is None else self.rates.seconds(workload)


@dataclass(frozen=True)
class RunPlan:
    """What a run will take.

    Attributes:
        run_dir: the run directory.
        stages: in order.
        device: "cpu", "cuda" or another.
        memory_limit: bytes of memory of the device.
        disk_free: bytes.
        trial: whether times were measured.
        target: the machines that are planned for; None for this one.
        others: that other processes took time from the trial; None if they did not.
    """

    run_dir: Path
    stages: list[StagePlan]
    device: str
    memory_limit: int
    disk_free: int
    trial: bool
    target: Target | None = None
    others: str | None = None

    @property
    def too_large(self) -> list[StagePlan]:
        """Stages that do not fit the memory."""
        return [stage for stage in self.stages if not stage.fits]

    @property
    def seconds(self) -> float | None:
        """Seconds of all stages together; None where they are neither measured nor predicted, or one does not fit."""
        if self.too_large:
            return None
        known = [sum(stage.seconds.values()) for stage in self.stages if stage.seconds is not None]
        return sum(known) if self.trial or known else None
