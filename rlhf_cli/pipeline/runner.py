"""Runs the stages of a recipe in order; each stage's artifact is published atomically."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_cli.console import show_under_bar, working
from rlhf_cli.distributed.coordinator import Coordinator, StageStart
from rlhf_cli.distributed.process_group import is_joined, join_launched
from rlhf_cli.distributed.ranks import is_main, local_world_size, world_size
from rlhf_cli.distributed.signals import SignalStop, StopRequest
from rlhf_cli.errors import RequirementError
from rlhf_cli.memory import keep_freed_memory, return_freed_memory
from rlhf_cli.models.model_shape import ModelShape
from rlhf_cli.models.resources import Extent
from rlhf_cli.pipeline.agreement import check_agreement
from rlhf_cli.pipeline.disk_space import check_free_space, disk_errors, needed_bytes
from rlhf_cli.pipeline.fingerprint import fingerprint
from rlhf_cli.pipeline.manifest import Manifest, finite, list_outputs, now, versions
from rlhf_cli.pipeline.paths import resolve_paths
from rlhf_cli.pipeline.planner import Planner, Step
from rlhf_cli.pipeline.preflight import preflight
from rlhf_cli.pipeline.record import Record, command_line
from rlhf_cli.pipeline.remote.attach import remote_copy
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.pipeline.selection import Selection, select
from rlhf_cli.pipeline.stage_run import manifest_settings, run_stage, stage_context
from rlhf_cli.progress import say, warn
from rlhf_cli.recipe.loader import LoadedRecipe
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.run_log import LOG, logged
from rlhf_cli.running_tasks import begin_stage, recorded, what_is_saved
from rlhf_cli.stages import registry
from rlhf_cli.stages.base import ENGINE_RECORD, Stage
from rlhf_cli.stages.generation import check_drawing
from rlhf_cli.stages.inputs import Input
from rlhf_cli.stages.sharding import check_processes, described_processes
from rlhf_cli.training.monitoring.timing_log import show_table


@dataclass(frozen=True)
class StageResult:
    """Outcome of one stage.

    Attributes:
        name: name of the stage.
        status: "done" or "cached"; in a dry run "would run", "would resume" or "cached".
        reason: why the stage ran or did not.
        path: folder of the artifact.
        seconds: duration of the attempt that made the artifact; None in a dry run.
        metrics: metrics of the stage.
        summary: (metric, value) rows for the summary table.
        timing: where the time of that attempt and of those it resumed went; see docs/metrics.md.
        device_bytes: in a dry run, most memory of a GPU that the stage needs, if the base model says its sizes.
    """

    name: str
    status: str
    reason: str
    path: Path
    seconds: float | None
    metrics: dict[str, float | None]
    summary: list[list[str]]
    timing: dict[str, float]
    device_bytes: int | None = None


@dataclass(frozen=True)
class RunResult:
    """Outcome of a run.

    Attributes:
        run_dir: the run directory.
        stages: outcome of each selected stage, in order.
    """

    run_dir: Path
    stages: list[StageResult]

    def as_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints; `metrics` are those of `evaluate`, if it was selected."""
        rows = [
            {
                "name": row.name,
                "status": row.status,
                "reason": row.reason,
                "path": str(row.path),
                "seconds": None if row.seconds is None else round(row.seconds, 3),
                "metrics": row.metrics,
                "timing": row.timing,
            }
            for row in self.stages
        ]
        evaluated = next((row.metrics for row in self.stages if row.name == "evaluate"), {})
        return {"run_dir": str(self.run_dir), "stages": rows, "metrics": evaluated}


def run(loaded: LoadedRecipe, folder: Path, selection: Selection) -> RunResult:
    """Run the selected stages that are not up to date.

    Raises:
        RLHFError: any problem that a user can cause; the run directory stays unchanged or resumable.
    """
    recipe = resolve_paths(loaded)
    chosen = select(recipe, selection)
    directory = RunDirectory(folder)
    limit_threads(recipe.model.threads)
    if recipe.model.sharding == "none":
        keep_freed_memory()
    else:
        return_freed_memory()
    join_launched()
    coordinator = Coordinator(partial(check_agreement, recipe, folder))
    if not is_main():
        _follow(recipe, directory, coordinator)
        return RunResult(folder, [])
    with (
        loaded.locating(),
        directory.lock(),
        remote_copy(recipe.remote, folder, recipe.name) as copy,
        logged(folder / LOG, f"$ {command_line()}"),
        SignalStop(what_is_saved, show_under_bar) as stop,
        disk_errors(folder),
        recorded(directory.progress_file),
    ):
        directory.recover()
        if copy is not None:
            copy.start(stop)
        if is_joined():  # on several machines, at once; on one, with the first stage: all may be up to date
            coordinator.begin()
        planner = Planner(recipe, directory, chosen, selection)
        with working("checking the recipe, its models and its data ..."):
            steps = planner.plan(partial(check_steps, recipe))
        if to_run := not_cached(steps):
            check_processes(recipe, {step.stage.name for step in to_run})
            check_drawing(recipe, inputs_of(to_run), world_size(), local_world_size())
            check_free_space(folder, needed_bytes(recipe, [step.stage for step in to_run]))
        record = Record(folder, loaded, recipe, is_whole=selection.names_stages)
        record.begin()
        if to_run and (processes := described_processes(recipe.model, world_size())):
            say(processes)
        executor = _Executor(recipe, directory, stop, coordinator, record)
        rows = [executor.execute(planner.update(step) if step.is_pending else step) for step in steps]
        coordinator.broadcast(None)
        return RunResult(folder, rows)


def _follow(recipe: Recipe, directory: RunDirectory, coordinator: Coordinator) -> None:
    """Run, on every rank but 0, the stages that rank 0 broadcasts, until there are no more."""
    with SignalStop() as stop, disk_errors(directory.path):
        while (start := coordinator.receive()) is not None:
            stage = registry.stage(start.stage)
            inputs = stage.inputs_type.from_json(start.inputs)
            run_stage(stage_context(recipe, directory, stage, inputs, stop))
            coordinator.barrier()


def limit_threads(count: int | None) -> None:
    """Limit the CPU threads of numerical libraries, which read these variables on import."""
    if count is not None:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(count)


def dry_run(loaded: LoadedRecipe, folder: Path, selection: Selection) -> RunResult:
    """Return what `run` would do, after the same checks; writes nothing and takes no lock."""
    recipe = resolve_paths(loaded)
    directory = RunDirectory(folder)
    planner = Planner(recipe, directory, select(recipe, selection), selection)
    with loaded.locating():
        steps = planner.plan(partial(check_steps, recipe))
    status = {"run": "would run", "resume": "would resume", "cached": "cached"}
    path = recipe.model.path
    shape = None if path is None or not Path(path).is_dir() else ModelShape.of(Path(path))
    rows = []
    for step in steps:
        made = step.manifest
        if made is not None:
            _accept(recipe, directory, step.stage, made)
        need = None if shape is None else step.stage.memory(recipe.section(step.stage.name), recipe, Extent(shape))
        rows.append(
            StageResult(
                name=step.stage.name,
                status=status[step.action],
                reason=step.reason,
                path=directory.artifact(step.stage.name),
                seconds=None,
                metrics={} if made is None else made.metrics,
                summary=[] if made is None else made.summary,
                timing={} if made is None else made.timing,
                device_bytes=None if need is None else need.total,
            )
        )
    return RunResult(folder, rows)


class _Executor:
    """Executes the steps of a plan."""

    def __init__(
        self, recipe: Recipe, run: RunDirectory, stop: StopRequest, coordinator: Coordinator, record: Record
    ) -> None:
        self._recipe = recipe
        self._record = record
        self._run = run
        self._stop = stop
        self._coordinator = coordinator

    def execute(self, step: Step) -> StageResult:
        """Run a stage unless it is cached."""
        name = step.stage.name
        if step.manifest is not None:
            say(f"{name}: up to date")
            self._accept(step.stage, step.manifest)
            return self._result(step, "cached", step.manifest)
        self._stop.check()
        if step.reason.startswith("damaged: "):
            warn(f"{name} is {step.reason}; running it again")
        else:
            say(f"{name}: {'resuming' if step.action == 'resume' else 'starting'} ({step.reason})")
        earlier = self._run.location_of_earlier(name, fingerprint(step.identity)) if step.stage.keeps_earlier else None
        if earlier is not None:
            say(f"{name}: the earlier results will move to {earlier}; another --run-dir keeps both in place")
        elif step.action == "run" and self._run.artifact(name).exists():
            say(f"{name}: its finished result is replaced when the new one is done; another --run-dir keeps both")
        self._accept_inputs(step)
        self._record.begin_stage(name)
        begin_stage(name)
        self._run.begin(name, step.identity, resume=step.action == "resume")
        manifest = self._work(step)
        if continues := step.stage.continues(self._recipe.section(name)):
            say(f"{name}: its last checkpoint is kept: a larger `{step.stage.steps_setting}` continues from there")
        self._run.publish(name, manifest, earlier=earlier, keeps_last=continues)
        show_table(name, manifest.timing, manifest.seconds)
        self._accept(step.stage, manifest)
        return self._result(step, "done", manifest)

    def _accept(self, stage: Stage, manifest: Manifest) -> None:
        """Raise `RequirementError` if the recipe requires more of an artifact, after letting the other ranks end."""
        try:
            _accept(self._recipe, self._run, stage, manifest)
        except RequirementError:
            self._coordinator.broadcast(None)
            raise

    def _accept_inputs(self, step: Step) -> None:
        """Check what the recipe requires of finished artifacts that a stage reads, whichever command wrote them."""
        upstream = {given.upstream for given in step.inputs.by_name().values() if given.upstream is not None}
        for stage in map(registry.stage, sorted(upstream)):
            manifest = self._run.read_manifest(stage.name)
            if manifest is not None and self._recipe.section(stage.name) is not None:
                self._accept(stage, manifest)

    def _work(self, step: Step) -> Manifest:
        context = stage_context(self._recipe, self._run, step.stage, step.inputs, self._stop)
        started, clock = now(), time.monotonic()
        self._coordinator.broadcast(StageStart(step.stage.name, step.inputs.to_json()))
        outcome = run_stage(context)
        self._coordinator.barrier()
        outputs = list_outputs(context.output)
        if not outputs:
            raise RuntimeError(f"stage {step.stage.name} wrote nothing")
        return Manifest(
            stage=step.stage.name,
            fingerprint=fingerprint(step.identity),
            identity=step.identity,
            settings=manifest_settings(self._recipe, step.stage, context.work / ENGINE_RECORD),
            outputs=outputs,
            versions=versions(),
            skipped=dict(outcome.skipped),
            metrics=finite(outcome.metrics),
            summary=[[str(metric), str(value)] for metric, value in outcome.summary],
            started=started,
            finished=now(),
            seconds=round(time.monotonic() - clock, 3),
            timing=dict(outcome.timing),
        )

    def _result(self, step: Step, status: str, manifest: Manifest) -> StageResult:
        return StageResult(
            name=step.stage.name,
            status=status,
            reason=step.reason,
            path=self._run.artifact(step.stage.name),
            seconds=manifest.seconds,
            metrics=manifest.metrics,
            summary=manifest.summary,
            timing=manifest.timing,
        )


def _accept(recipe: Recipe, run: RunDirectory, stage: Stage, manifest: Manifest) -> None:
    stage.accept(recipe.section(stage.name), manifest.metrics, run.artifact(stage.name))


def not_cached(steps: Iterable[Step]) -> list[Step]:
    """Return the steps of a plan that do something."""
    return [step for step in steps if step.action != "cached"]


def check_steps(recipe: Recipe, steps: Iterable[Step]) -> None:
    """Check the inputs of all steps that do something; see `preflight`."""
    to_run = not_cached(steps)
    preflight(recipe, inputs_of(to_run), {step.stage.name for step in to_run})


def inputs_of(steps: Iterable[Step]) -> list[Input]:
    """Return all inputs of steps."""
    return [given for step in steps for given in step.inputs.by_name().values()]
