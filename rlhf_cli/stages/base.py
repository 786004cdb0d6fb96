"""What a stage declares, what it is given and what it returns.

A stage is a folder of this package. Its `stage.py` declares one `Stage`; `stages/registry.py` has a line for it. The
planner, the checks before a run, `recipe show`, `--help` and the documentation read the declaration, which imports no
torch. The work is in the module that the declaration names, by convention `run.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.settings.base import StageSection
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.stages.inputs import InputFinder, StageInputs

KEPT = "kept"
"""Folder of a run directory that no command of ours empties."""

S = TypeVar("S", bound=StageSection)
I = TypeVar("I", bound=StageInputs)  # noqa: E741  (the pair S, I is used as a type parameter list only)

Sizes = Mapping[str, int | str]
"""What is derived -> figure: sizes that follow from settings, shown by `recipe show`."""


@dataclass(frozen=True)
class Flag:
    """A command-line option of a stage that is short for one setting.

    Attributes:
        option: such as `--reward-model`.
        setting: dotted, such as `ppo.reward_model`.
        help: one line.
        metavar: what the value is, such as MODEL.
        kind: type of the value.
        repeatable: the option may be given several times; the setting is a list.
        entry: of a repeatable option: each value becomes `{entry: value}` in the list, which several options may fill.
    """

    option: str
    setting: str
    help: str
    metavar: str
    kind: type = str
    repeatable: bool = False
    entry: str | None = None

    @property
    def name(self) -> str:
        """Name of the parameter: `reward_model`."""
        return self.option.removeprefix("--").replace("-", "_")


@dataclass(frozen=True)
class StageOutcome:
    """What a stage returns.

    Attributes:
        metrics: figures for the manifest, the closing table and `--json`.
        skipped: reason -> number of skipped records.
        summary: (what, figure) rows of the closing table.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    summary: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class StageContext(Generic[S, I]):
    """What a stage is given.

    Attributes:
        stage: its declaration.
        settings: its section of the recipe.
        inputs: what it reads.
        recipe: settings that all stages share: seed, model, data, tracking.
        output: folder to write the artifact into; renamed into place when the stage returns.
        work: folder that survives a killed attempt, for step checkpoints and partial samples; removed when the stage is
            done.
        stop: tells whether a signal asked the run to stop.
        tracked: dotted settings that the result depends on, for trackers.
    """

    stage: Stage[S, I]
    settings: S
    inputs: I
    recipe: RunSettings
    output: Path
    work: Path
    stop: StopRequest
    tracked: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> Path:
        """Folder for what cannot be computed again (labels by people, paid verdicts); `--force` leaves it alone.

        The stage makes it when it has something to keep.
        """
        return self.output.parent / KEPT / self.stage.name


def no_sizes(settings: Any, recipe: RunSettings) -> Sizes:
    """Sizes of a stage from whose settings none follow."""
    return {}


def no_check(settings: Any, recipe: RunSettings) -> None:
    """Check of a stage whose settings contradict no shared ones."""


def no_bytes(settings: Any, model_bytes: int) -> int:
    """Disk space of a stage that writes no weights."""
    return 0


@dataclass(frozen=True)
class Stage(Generic[S, I]):
    """A stage of the pipeline, declared once.

    Attributes:
        name: of its command and of its folder in the run directory; its section of the recipe has `_` for `-`.
        settings: class of its section.
        inputs_type: record of what it reads.
        inputs: finds it; raises `UsageError` for an input that is missing.
        writes: what its artifact is, for messages.
        module: with `run(context) -> StageOutcome`, which does the work; imported when the stage runs.
        flags: options of its command.
        sizes: sizes that follow from its settings.
        check: raises `ValueError` where its settings contradict the shared ones.
        disk_bytes: (settings, bytes of the base model in float32) -> bytes that it writes at most.
        unaffected_by: shared settings, by dotted prefix, that do not change its result.
    """

    name: str
    settings: type[S]
    inputs_type: type[I]
    inputs: Callable[[S, RunSettings, InputFinder], I]
    writes: str
    module: str
    flags: tuple[Flag, ...] = ()
    sizes: Callable[[S, RunSettings], Sizes] = no_sizes
    check: Callable[[S, RunSettings], None] = no_check
    disk_bytes: Callable[[S, int], int] = no_bytes
    unaffected_by: tuple[str, ...] = ()

    @property
    def section(self) -> str:
        """Key of its section in the recipe."""
        return section_of(self.name)


def section_of(stage: str) -> str:
    """Key of a stage's section in the recipe."""
    return stage.replace("-", "_")


def training_bytes(model_bytes: int, *, trained: int, written: int, kept: int) -> int:
    """Disk space of a stage that trains and writes weights.

    Models are written in float32. A checkpoint of a model trained in full holds its weights and AdamW's two moments;
    while it is written there is one checkpoint more than are kept. Adapters are small beside that.

    Args:
        model_bytes: of the base model in float32.
        trained: models that are trained in full.
        written: whole models in the artifact.
        kept: step checkpoints that stay.
    """
    return model_bytes * (written + 3 * trained * (kept + 1))
