"""What a run will take: steps, tokens, operations, memory, disk and time of each stage, before it runs.

Counts come from the data as the stages read it and from the shapes of their models (`stages.workload`); memory from
the formulas that `--dry-run` uses (`models.resources`); time from a trial of a few seconds (`stages.trial`). What an
earlier stage has still to write is taken to be like the base model, and completions to be as long as they may be, or
as long as the trial found. For other machines (`plan_target`), time is predicted from data sheets (`prediction`).
Nothing is written to the run directory.
"""

from __future__ import annotations

import importlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.console import working
from rlhf_cli.distributed.signals import SignalStop
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.memory import free_memory, keep_freed_memory, machine_memory
from rlhf_cli.models.model_shape import FLOAT32
from rlhf_cli.models.resources import CPU_PROCESS, Extent
from rlhf_cli.other_processes import ProcessorUse
from rlhf_cli.pipeline.disk_space import model_bytes
from rlhf_cli.pipeline.paths import resolve_paths
from rlhf_cli.pipeline.plan_advice import Advice, accepted_by, advise
from rlhf_cli.pipeline.plan_target import Target
from rlhf_cli.pipeline.planner import Planner, Step
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.pipeline.run_plan import RunPlan, StagePlan
from rlhf_cli.pipeline.runner import check_steps, inputs_of, limit_threads, not_cached
from rlhf_cli.pipeline.selection import Selection, select
from rlhf_cli.progress import Task, task
from rlhf_cli.recipe.loader import LoadedRecipe
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.base import Stage, StageContext
from rlhf_cli.stages.common import model_source
from rlhf_cli.stages.inputs import Input, StageInputs
from rlhf_cli.stages.precision import decide_precision
from rlhf_cli.stages.registry import stages
from rlhf_cli.stages.sharding import SHARDED_STAGES, check_several
from rlhf_cli.stages.training_memory import host_copy
from rlhf_cli.stages.workload import Reading, Workload

if TYPE_CHECKING:
    from rlhf_cli.models.loading import ModelSource
    from rlhf_cli.stages.trial import Rates, TrialProgress

TRIAL_SECONDS = 10.0
"""Seconds that the trials of all stages take together, without loading models; up to twice that for large ones."""
_SAMPLING_INPUTS = ("sft", "ppo")
"""Stages that write language models like the one they start from."""


def plan_run(
    loaded: LoadedRecipe, folder: Path, selection: Selection, *, trial: bool = True, target: Target | None = None
) -> RunPlan:
    """Plan a run.

    Args:
        loaded: the recipe.
        folder: the run directory, which need not exist.
        selection: stages of the command line.
        trial: whether to measure how long things take; nothing is measured for other machines.
        target: other machines to plan for.

    Raises:
        RLHFError: what the run itself would report before it starts.
    """
    recipe = resolve_paths(loaded)
    here, trial = (recipe, trial) if target is None else (target.here(recipe), False)
    limit_threads(here.model.threads)
    keep_freed_memory()

    def check(steps: Sequence[Step]) -> None:
        names = {step.stage.name for step in not_cached(steps)}
        if names & set(SHARDED_STAGES):
            several = "plan for several GPUs with `--gpu NAME --gpus N`"
            check_several(recipe.model, 1 if target is None else target.cluster.count, several)
        if target is not None:  # `here` has whole models
            target.check(recipe, names, inputs_of(not_cached(steps)))
        check_steps(here, steps)

    run, chosen = RunDirectory(folder), select(recipe, selection)
    present = [stage for stage in stages() if recipe.section(stage.name) is not None]
    earlier = present[: present.index(chosen[0])]
    planner = Planner(recipe, run, chosen, selection, assumed=[stage.name for stage in earlier])
    with loaded.locating(), working("checking the recipe, its models and its data ..."):
        steps = planner.plan(check)
    from rlhf_cli.models.device import resolve_device

    device = resolve_device(here.model.device).type
    limit = machine_memory(device) if target is None else int(target.cluster.memory)
    trained = [step for step in not_cached(steps) if step.stage.workload is not None]
    with tempfile.TemporaryDirectory(prefix="rlhf-plan-") as scratch:
        seconds = TRIAL_SECONDS / max(1, len(trained)) if trial else None
        stage_planner = _StagePlanner(here, Path(scratch), device, limit, seconds, target, recipe, steps)
        use = ProcessorUse()
        with _shown(len(trained), trial=trial) as bar:
            for stage in earlier:
                if stage.name == "sft" and here.model.build is not None and not run.artifact(stage.name).is_dir():
                    stage_planner.build_base(stage, planner.inputs(stage))
            planned = [stage_planner.plan(step, bar) for step in steps]
    existing = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    device = device if target is None else "cuda"
    others = use.others() if trial and trained else None
    return RunPlan(folder, planned, device, limit, shutil.disk_usage(existing).free, trial, target, others)


@contextmanager
def _shown(count: int, *, trial: bool) -> Iterator[Task | None]:
    """Show how far the trials of so many stages are; without trials there is no bar, since that takes seconds."""
    if not trial or not count:
        with working("counting tokens and passes ..."):
            yield None
        return
    with task("measuring", count, "stages", saves=False) as bar:
        yield bar


class _StagePlanner:
    """Plans one stage after another; the base model that `sft` makes stands for what later stages read."""

    def __init__(
        self,
        recipe: Recipe,
        scratch: Path,
        device: str,
        limit: int,
        seconds: float | None,
        target: Target | None,
        asked: Recipe,
        steps: Sequence[Step],
    ) -> None:
        self._recipe, self._scratch, self._device, self._limit, self._seconds = recipe, scratch, device, limit, seconds
        self._target, self._asked = target, asked
        self._stand_in = recipe.model.path
        to_run = not_cached(steps)
        self._accepts = accepted_by(asked, {step.stage.name for step in to_run})
        self._to_come = sum(step.stage.workload is not None for step in to_run)
        self._took = list[float]()
        self._written = {step.stage.name for step in steps}

    def build_base(self, sft: Stage, inputs: StageInputs) -> None:
        """Make the model of `model.build`, which `sft` makes first, if that stage is not planned."""
        reading = importlib.import_module(str(sft.workload)).read(self._context(sft, inputs))
        self._stand_in = reading.model

    def plan(self, step: Step, bar: Task | None) -> StagePlan:
        """Return what a stage will take; the bar counts the stages that have trials."""
        began = time.monotonic()

        def progress(units: float, doing: str) -> None:
            if bar is not None:
                took = time.monotonic() - began
                each = statistics.mean(self._took) if self._took else took / units if units else None
                left = None if each is None else max(each * self._to_come - took, 0.0)
                bar.within(units, f"{step.stage.name}: {doing}", left=left, is_guess=not self._took)

        planned = self._plan(step, progress)
        if bar is not None and step.manifest is None and step.stage.workload is not None:
            bar.advance()
            self._to_come -= 1
            if planned.rates is not None:
                self._took.append(time.monotonic() - began)
        return planned

    def _plan(self, step: Step, progress: TrialProgress) -> StagePlan:
        stage, section = step.stage, self._recipe.section(step.stage.name)
        if step.manifest is not None or stage.workload is None:
            return StagePlan(stage.name, step.action, step.reason)
        progress(0.0, "reading data")
        context = self._context(stage, step.inputs)
        if self._target is None:  # else it is decided, and not for this machine
            context = decide_precision(context)
        reading: Reading | None = importlib.import_module(stage.workload).read(context)
        self._stand_in = self._stand_in or (None if reading is None else reading.model)
        if reading is None:
            return StagePlan(stage.name, step.action, step.reason)
        recipe, workload = context.recipe, reading.at(None)
        if self._target is not None:
            recipe = self._target.there(self._recipe, self._asked)
        extent = self._extent(reading, workload)
        memory = stage.memory(section, recipe, extent)
        rates = None
        if self._seconds is not None and (memory is None or memory.total < self._limit):
            rates = self._trial(context, reading, self._seconds, progress)
            if rates.process and self._device == "cpu":
                extent = replace(extent, process=rates.process)
                memory = stage.memory(section, recipe, extent)
        expected = None if rates is None or rates.mean is None else reading.at(rates.mean)
        predicted, fits = None, memory is None or memory.total <= self._limit
        if self._target is not None and memory is not None:
            predicted = self._target.predict(section, recipe, extent, workload) if fits else None
            notes = self._target.notes(recipe, extent, workload)
            workload = replace(workload, notes=(*workload.notes, *notes))
        if missing := self._missing(step):
            note = f"not there yet, and taken to be as this recipe makes it: the output of {', '.join(missing)}"
            workload = replace(workload, notes=(*workload.notes, note))
        if copied := host_copy(section, recipe, extent, workload.trained):
            note = f"the copy of a checkpoint takes up to {copied / 1e9:,.1f} GB of host memory on each machine"
            workload = replace(workload, notes=(*workload.notes, note))
        whole = max(2 * model_bytes(self._recipe.model.path), FLOAT32 * reading.shape.weights)
        advice, combined = list[Advice](), list[Advice]()
        if not fits:
            advice, combined = advise(stage, section, recipe, extent, self._limit, self._accepts)
        return StagePlan(
            name=stage.name,
            action=step.action,
            reason=step.reason,
            workload=workload,
            expected=expected,
            precision=recipe.model.precision,
            memory=memory,
            disk=stage.disk_bytes(section, whole),
            rates=rates,
            sizes=dict(stage.sizes(section, self._recipe)),
            advice=tuple(advice),
            combined=tuple(combined),
            predicted=predicted,
            fits=fits,
        )

    def _missing(self, step: Step) -> list[str]:
        """Return the stages whose output is read, but is not there and not written by a stage of this plan."""
        read = {given.upstream for given in step.inputs.by_name().values() if not Path(given.source).exists()}
        return [f"`{name}`" for name in sorted(filter(None, read - self._written))]

    def _extent(self, reading: Reading, workload: Workload) -> Extent:
        extent = Extent(
            shape=reading.shape,
            reward=workload.reward,
            on_cpu=self._device == "cpu",
            process=CPU_PROCESS,
            tokens=workload.largest,
            prompt=workload.prompt,
            records=workload.records,
            device=self._limit,
        )
        return extent if self._target is None else self._target.extent(extent, workload)

    def _trial(
        self, context: StageContext[Any, Any], reading: Reading, seconds: float, progress: TrialProgress
    ) -> Rates:
        from rlhf_cli.stages.trial import run_trial

        settings, recipe = context.settings, context.recipe
        source: ModelSource = model_source(recipe, reading.model, quantized=reading.trains)
        if reading.trains and reading.rank is None:
            source = source.in_full()
        sampling = Sampling.resolve(recipe.sampling)
        rows = getattr(settings, "rollout_batch_size", None) or getattr(settings, "sampling", sampling).batch_size
        sampling = replace(sampling, batch_size=rows, max_new_tokens=reading.longest or sampling.max_new_tokens)
        rates = run_trial(
            reading,
            source,
            sampling,
            optimizer=getattr(settings, "optimizer", "adamw"),
            recompute=getattr(settings, "gradient_checkpointing", False),
            seconds=seconds,
            folder=self._scratch,
            progress=progress,
        )
        free_memory()
        return rates

    def _context(self, stage: Stage, inputs: StageInputs) -> StageContext[Any, Any]:
        name = stage.name
        work = self._scratch / f".{name}.work"
        work.mkdir()
        return StageContext(
            stage=stage,
            settings=self._recipe.section(name),
            inputs=self._inputs(inputs),
            recipe=self._recipe,
            output=self._scratch / name,
            work=work,
            stop=SignalStop(),
            shape=None if self._target is None else self._target.shape,
        )

    def _inputs(self, inputs: StageInputs) -> StageInputs:
        """Return the inputs with the base model in the place of models that are not there yet."""

        def present(given: Any) -> Any:
            if isinstance(given, tuple):
                return tuple(map(present, given))
            is_to_come = (
                isinstance(given, Input) and given.upstream in _SAMPLING_INPUTS and not Path(given.source).exists()
            )
            return replace(given, source=self._stand_in, kind="model", upstream=None) if is_to_come else given

        return replace(inputs, **{one.name: present(getattr(inputs, one.name)) for one in fields(inputs)})
