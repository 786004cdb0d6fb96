"""The stage table and what a stage is given and returns. Torch-free: stages import their engines when they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cli.distributed.signals import StopRequest

if TYPE_CHECKING:
    from rlhf_cli.recipe.schema import Recipe

KEPT = "kept"
"""Name of the folder in a run directory that nothing of ours ever empties."""


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        name: of the command and of its folder in the run directory.
        reads: earlier stages whose artifacts it takes, unless a setting names something else.
        writes: what the artifact is, for messages.
    """

    name: str
    reads: tuple[str, ...]
    writes: str

    @property
    def section(self) -> str:
        """Key of its section in the recipe."""
        return self.name.replace("-", "_")


STAGES = (
    Stage("sft", reads=(), writes="SFT model"),
    Stage("label", reads=("sft",), writes="rankings"),
    Stage("train-rm", reads=("sft", "label"), writes="reward model"),
    Stage("ppo", reads=("sft", "train-rm"), writes="PPO policy"),
    Stage("evaluate", reads=("sft", "train-rm", "ppo"), writes="evaluation"),
)


@dataclass(frozen=True)
class StageContext:
    """What a stage is given.

    Attributes:
        recipe: resolved settings.
        stage: its row.
        output: folder to write the artifact into; renamed into place when the stage returns.
        work: folder that outlives a killed attempt, for step checkpoints and partial samples; gone when all is done.
        inputs: input name -> folder, file or hub id. Names: "base", "sft", "label", "train-rm", "ppo" for
            what an earlier stage wrote (or the setting that replaces it), and one per data setting ("sft.data", ...).
        stop: asks for signals.
    """

    recipe: Recipe
    stage: Stage
    output: Path
    work: Path
    inputs: Mapping[str, str]
    stop: StopRequest

    @property
    def kept(self) -> Path:
        """Folder for what no rerun can make again (labels by people, verdicts that were paid for): `--force` leaves it
        alone too. The stage makes it when it has something to keep."""
        return self.output.parent / KEPT / self.stage.name


@dataclass(frozen=True)
class StageOutcome:
    """What a stage returns.

    Attributes:
        metrics: figures for the manifest, the closing table and `--json`.
        skipped: reason -> records skipped.
        summary: (what, figure) rows for people, in the closing table.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    summary: list[tuple[str, str]] = field(default_factory=list)
