"""Declaration, context and outcome of a stage.

A stage is a folder of this package. Its `stage.py` declares one `Stage`, and `stages/registry.py` lists it in one line.
The planner, the preflight checks, `recipe show`, `--help` and the documentation read the declaration, which imports no
torch. The declaration names the module that does the work, by convention `run.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from rlhf_cli.distributed.signals import StopRequest
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.model_shape import ModelShape
from rlhf_cli.models.resources import (
    Extent,
    MemoryNeed,
    loading,
    memory_need,
    number_bytes,
    own_part,
    sent,
    shards,
    vllm_share,
)
from rlhf_cli.settings.base import StageSection
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.settings.shared import StageSamplingSettings
from rlhf_cli.stages.inputs import InputFinder, StageInputs

KEPT = "kept"
"""Folder of a run directory that no command deletes from."""

PRECISION_RECORD = "precision.txt"
"""File of the work folder with the precision that `model.precision: auto` stands for."""

ENGINE_RECORD = "engine.txt"
"""File of the work folder with what draws the stage's completions: `torch`, or `vllm` and its version."""

S = TypeVar("S", bound=StageSection)
I = TypeVar("I", bound=StageInputs)  # noqa: E741  (the pair S, I is used as a type parameter list only)

Sizes = Mapping[str, int | str]
"""Quantity -> value: sizes derived from settings, shown by `recipe show`."""


@dataclass(frozen=True)
class Flag:
    """A command-line option that sets one setting of the recipe.

    Attributes:
        option: such as `--reward-model`.
        setting: dotted, such as `ppo.reward_model`.
        help: one line.
        metavar: placeholder of the value in the help, such as MODEL.
        kind: type of the value.
        repeatable: whether the option may be given several times; the setting is then a list.
        entry: for a repeatable option, each value becomes `{entry: value}` in the list. Several options may fill one
            list.
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
        """Name of the Python parameter, such as `reward_model`."""
        return self.option.removeprefix("--").replace("-", "_")


@dataclass(frozen=True)
class StageOutcome:
    """What a stage returns.

    Attributes:
        metrics: metrics for the manifest and `--json`.
        skipped: reason -> number of skipped records.
        summary: (metric, value) rows for the summary table.
        timing: where the time went, for the manifest, `--json` and a table; see docs/metrics.md.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    summary: list[tuple[str, str]] = field(default_factory=list)
    timing: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StageContext(Generic[S, I]):
    """Everything a stage receives when it runs.

    Attributes:
        stage: the stage's declaration.
        settings: the stage's section of the recipe.
        inputs: the stage's inputs.
        recipe: the shared settings: seed, model, data, tracking.
        output: folder to write the artifact to; renamed into place when the stage returns.
        work: folder that survives an interrupted attempt, for step checkpoints and partial samples; removed when the
            stage is done.
        stop: whether a signal requested a stop.
        tracked: dotted settings that the result depends on, for trackers.
        shape: what a plan counts with in the place of the sizes of the models; None takes these.
    """

    stage: Stage[S, I]
    settings: S
    inputs: I
    recipe: RunSettings
    output: Path
    work: Path
    stop: StopRequest
    tracked: Mapping[str, Any] = field(default_factory=dict)
    shape: ModelShape | None = None

    def shape_of(self, folder: Path) -> ModelShape:
        """Return the sizes that a plan counts with for the model in a folder.

        Raises:
            ModelError: the folder does not say them.
        """
        return self.shape or ModelShape.required(folder)

    @property
    def kept(self) -> Path:
        """Folder for what cannot be computed again (human labels, paid verdicts); `--force` does not touch it.

        The stage creates it when it has something to keep.
        """
        return self.output.parent / KEPT / self.stage.name


def no_sizes(settings: Any, recipe: RunSettings) -> Sizes:
    """Default of `Stage.sizes`: no derived sizes."""
    return {}


def no_check(settings: Any, recipe: RunSettings) -> None:
    """Default of `Stage.check`: every combination with the shared settings is valid."""


def no_bytes(settings: Any, model_bytes: int) -> int:
    """Default of `Stage.disk_bytes`: the stage writes no weights."""
    return 0


def accept_all(settings: Any, metrics: Mapping[str, float | None], folder: Path) -> None:
    """Default of `Stage.accept`: nothing is required of the artifact."""


def no_reason(settings: Any) -> str | None:
    """Default of `Stage.fixed_steps`."""
    return None


def sampling_memory(sampling: StageSamplingSettings, recipe: RunSettings, extent: Extent) -> MemoryNeed:
    """Return the memory of a stage that only samples, one model at a time.

    Args:
        sampling: of the stage's section.
        recipe: of the run.
        extent: of the stage.
    """
    sampled = sampling.max_new_tokens or recipe.sampling.max_new_tokens or Sampling.max_new_tokens
    longest = (extent.prompt or recipe.data.max_prompt_tokens) + sampled
    weights = {"policy": own_part(recipe.model, extent, extent.shape.weights * number_bytes(recipe.model.precision))}
    drawing = drawing_memory(recipe, extent, sampling.batch_size, longest)
    loads = loading(extent, weights, shards(recipe.model, extent))
    return memory_need(extent, {"load": loads, "rollout": weights | drawing})


def drawing_memory(recipe: RunSettings, extent: Extent, rows: int, longest: int) -> dict[str, float]:
    """Return the roles of drawing from a policy that is not trained, without its weights: bytes by role.

    Args:
        recipe: of the run.
        extent: of the stage.
        rows: completions that a process draws at a time.
        longest: tokens of a prompt with its completion.
    """
    shape, size, parts = extent.shape, number_bytes(recipe.model.precision), shards(recipe.model, extent)
    drawing = {"cache": float(shape.cache(rows, longest, size)), "logits": float(shape.sampling(rows))}
    gathered = {"gathered": shape.gathered(size, on_cpu=extent.on_cpu)} if parts > 1 else {}
    if recipe.generation.vllm_server is not None:
        drawing = {"sent": sent(shape)}
    elif recipe.generation.engine == "vllm":
        drawing = {"vLLM": vllm_share(shape, recipe.generation, extent, longest)} | gathered
    elif parts > 1:  # the whole policy, for every token
        drawing["gathered"] = shape.weights * size + (2.0 * shape.sent_at_once(size) if extent.on_cpu else 0.0)
    return drawing


def not_estimated(settings: Any, recipe: RunSettings, extent: Extent) -> MemoryNeed | None:
    """Default of `Stage.memory`."""
    return None


@dataclass(frozen=True)
class Stage(Generic[S, I]):
    """A stage of the pipeline, declared once.

    Attributes:
        name: name of the command and of the folder in the run directory; the recipe section has `_` for `-`.
        settings: class of the section.
        inputs_type: class of the inputs.
        inputs: finds the inputs; raises `UsageError` if one is missing.
        writes: what the artifact is, for messages, such as "reward model".
        module: module with `run(context) -> StageOutcome`, which does the work; imported when the stage runs.
        flags: options of the command.
        sizes: (settings, recipe) -> sizes derived from the settings.
        check: raises `ValueError` if the section contradicts the shared settings.
        disk_bytes: (settings, bytes of the base model in float32) -> upper bound of the bytes written.
        memory: (settings, recipe, extent) -> memory of a process by phase and role; None where it is not known.
        workload: module with `read(context)`, which counts the work for `rlhf plan`; None where it is not known.
        unaffected_by: dotted prefixes of shared settings that do not affect the result.
        accept: (settings, metrics, folder of the artifact) -> None; raises `RequirementError` if the recipe requires
            more of the finished artifact, and then no later stage runs. What it reads of the settings is effort only.
        keeps_earlier: an artifact that is replaced by one with other settings or inputs moves to `KEPT`.
        steps_setting: dotted setting of the number of steps; if it alone changes, the stage continues with the new
            number: an unfinished one that has not done more, and a finished one if it is raised. What is done after a
            last step may then differ from a run that began with that number; docs/guide.md says in what.
        fixed_steps: (settings) -> why another `steps_setting` would change the steps already done; None if it would
            not.
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
    memory: Callable[[S, RunSettings, Extent], MemoryNeed | None] = not_estimated
    workload: str | None = None
    unaffected_by: tuple[str, ...] = ()
    accept: Callable[[S, Mapping[str, float | None], Path], None] = accept_all
    keeps_earlier: bool = False
    steps_setting: str | None = None
    fixed_steps: Callable[[S], str | None] = no_reason

    def continues(self, settings: S) -> bool:
        """Whether the stage continues with another number of steps."""
        return self.steps_setting is not None and self.fixed_steps(settings) is None

    @property
    def section(self) -> str:
        """Key of the stage's section in the recipe."""
        return section_of(self.name)


def section_of(stage: str) -> str:
    """Key of a stage's section in the recipe."""
    return stage.replace("-", "_")


def training_bytes(model_bytes: int, *, trained: int, written: int, kept: int) -> int:
    """Return the disk space of a stage that trains and writes weights, in bytes.

    Models are written in float32. A checkpoint of a fully trained model holds its weights and the two moments of AdamW.
    While a checkpoint is written, there is one more than the number kept. The size of adapters is neglected.

    Args:
        model_bytes: size of the base model in float32.
        trained: number of models with all weights trained.
        written: number of whole models in the artifact.
        kept: number of step checkpoints kept.
    """
    return model_bytes * (written + 3 * trained * (kept + 1))
