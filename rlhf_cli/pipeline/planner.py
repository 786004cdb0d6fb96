"""Plans a run: which stages run, resume or are cached, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rlhf_cli.errors import ChangedInputsError, DataError, UsageError
from rlhf_cli.pipeline.fingerprint import PENDING, Digests, differences, fingerprint, identity, recall_commits
from rlhf_cli.pipeline.manifest import DamagedArtifact, Identity, Manifest
from rlhf_cli.pipeline.paths import check_models
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.pipeline.selection import Selection
from rlhf_cli.quoting import word
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages import registry
from rlhf_cli.stages.base import Stage
from rlhf_cli.stages.inputs import InputFinder, StageInputs
from rlhf_cli.training.checkpoint.names import steps_done

_SHOWN_DIFFERENCES = 5


@dataclass(frozen=True)
class Step:
    """One stage of a plan.

    Attributes:
        stage: the stage.
        action: "run" from the start, "resume" from the last checkpoint, or "cached" (finished and unchanged).
        reason: reason for the action, for messages.
        inputs: inputs of the stage.
        identity: what the result depends on; has `PENDING` digests for inputs that an earlier stage must write first.
        manifest: manifest of the finished artifact, if "cached".
        refusal: why the stage must not run, if so; `Planner` raises it.
    """

    stage: Stage
    action: Literal["run", "resume", "cached"]
    reason: str
    inputs: StageInputs
    identity: Identity
    manifest: Manifest | None = None
    refusal: UsageError | None = None

    @property
    def is_pending(self) -> bool:
        """Whether an earlier stage must run before the action is final."""
        return PENDING in self.identity["inputs"].values()


@dataclass(frozen=True)
class RunArtifacts:
    """Finished and planned artifacts of a run; implements `stages.inputs.Artifacts`.

    Attributes:
        run: run directory with the finished artifacts.
        planned: names of stages whose artifacts will be written before they are read, or are assumed to be.
    """

    run: RunDirectory
    planned: frozenset[str]

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.run.path

    def folder(self, stage: str) -> Path:
        """Return the folder of a stage's artifact, which may not exist yet."""
        return self.run.artifact(stage)

    def has(self, stage: str) -> bool:
        """Whether the artifact exists or will be written before it is read."""
        return stage in self.planned or self.run.artifact(stage).is_dir()

    def writes(self, stage: str) -> str:
        """Return what the stage's artifact is, such as "reward model"."""
        return registry.stage(stage).writes


class Planner:
    """Decides for each stage whether it runs, resumes or is cached.

    Args:
        recipe: recipe with resolved paths.
        run: the run directory.
        chosen: selected stages, in order.
        selection: what the command line selects.
        assumed: names of further stages whose artifacts are taken to be there, for a plan that is not carried out.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        chosen: list[Stage],
        selection: Selection,
        assumed: Iterable[str] = (),
    ) -> None:
        self._recipe = recipe
        self._run = run
        self._chosen = chosen
        self._force, self._names_stages = selection.force, selection.names_stages
        self._keeps_finished = selection.keeps_finished
        self._artifacts = RunArtifacts(run, frozenset([*assumed, *(stage.name for stage in chosen)]))
        self._digests = Digests(run)

    def plan(self, check: Callable[[Sequence[Step]], object]) -> list[Step]:
        """Return one step per selected stage.

        Args:
            check: raises an `RLHFError` if the inputs of the steps cannot be used. It runs before a stage is refused
                for inputs that changed: what is wrong with a changed file has to be known first.

        Raises:
            RLHFError: of `check`.
            UsageError: an input is missing, an artifact that a stage reads is not up to date, or a finished artifact
                would be replaced and must not be.
            DataError: an artifact that a stage reads is damaged.
            ChangedInputsError: an unfinished stage was started with other settings or inputs.
        """
        inputs = {stage.name: self.inputs(stage) for stage in self._chosen}
        check_models(given for record in inputs.values() for given in record.by_name().values() if given.matters)
        self._check_artifacts_read(inputs.values())
        steps: list[Step] = []
        pending: frozenset[str] = frozenset()
        changed: frozenset[str] = frozenset()
        for stage in self._chosen:
            step = self._step(stage, inputs[stage.name], pending, changed)
            if self._keeps_finished and step.refusal is None:
                step = replace(step, refusal=self._replacement_refusal(step))
            steps.append(step)
            if step.action != "cached":
                pending |= {stage.name}
                if self._differs(step):
                    changed |= {stage.name}
        check(steps)
        for step in steps:
            _raise_refusal(step)
        return steps

    def _replacement_refusal(self, step: Step) -> UsageError | None:
        name, known = step.stage.name, self._finished_identity(step.stage)
        if step.action != "run" or step.stage.keeps_earlier or name in self._force or known is None:
            return None
        if found := differences(known, step.identity, step.inputs):
            return UsageError(
                f"{self._run.path} has a finished `{name}` that was made differently: {_listed(found)}",
                hint=f"`--run-dir runs/NAME` keeps both; `--run-dir {word(self._run.path)}` replaces it",
            )
        return None

    def update(self, step: Step) -> Step:
        """Plan a stage again after the stages before it have finished."""
        step = self._step(step.stage, step.inputs, frozenset(), frozenset())
        _raise_refusal(step)
        return step

    def inputs(self, stage: Stage) -> StageInputs:
        """Return the inputs of a stage; raises `UsageError` if one is missing."""
        finder = InputFinder(stage.name, self._recipe, self._artifacts)
        return stage.inputs(self._recipe.section(stage.name), self._recipe, finder)

    def _check_artifacts_read(self, inputs: Iterable[StageInputs]) -> None:
        """Check that artifacts which this run reads but does not write match their manifests."""
        written = {stage.name for stage in self._chosen}
        read = {given.upstream for record in inputs for given in record.by_name().values() if given.upstream}
        for name in sorted(read - written):
            try:
                manifest = self._run.read_manifest(name)
                if manifest is not None:
                    manifest.verify(self._run.artifact(name))
                    self._check_current(name, manifest)
            except DamagedArtifact as damage:
                raise DataError(
                    f"`{name}` in {self._run.path} is damaged: {damage}",
                    hint=f"recreate it: omit --from, or run `rlhf {name}` with this run directory",
                ) from None

    def _check_current(self, name: str, manifest: Manifest) -> None:
        """Check that an artifact was made from the artifacts now in the run directory: an adapter needs its own
        base."""
        for field_name, upstream in manifest.identity["upstream"].items():
            beside = self._run.read_manifest(upstream)
            if beside is not None and manifest.identity["inputs"][field_name] != beside.content_digest:
                raise UsageError(
                    f"`{name}` in {self._run.path} was made from a different `{upstream}` than the current one",
                    hint=f"recreate it: omit --from, or run `rlhf {name}` with this run directory",
                )

    def _differs(self, step: Step) -> bool:
        """Whether a stage will write something different from what later stages may have started with."""
        known = self._run.began(step.stage.name) if step.action == "resume" else None
        known = known or self._finished_identity(step.stage)
        return known is not None and bool(differences(known, step.identity, step.inputs))

    def _finished_identity(self, stage: Stage) -> Identity | None:
        try:
            manifest = self._run.read_manifest(stage.name)
        except DamagedArtifact:
            return None
        return None if manifest is None else manifest.identity

    def _step(self, stage: Stage, inputs: StageInputs, pending: frozenset[str], changed: frozenset[str]) -> Step:
        what = identity(stage, self._recipe, inputs, self._digests, pending)
        if stage.name in self._force:
            return Step(stage, "run", "forced", inputs, what)
        what = recall_commits(what, self._finished_identity(stage))
        cached, reason = self._finished(stage, inputs, what)
        if cached is not None:
            return Step(stage, "cached", "unchanged", inputs, what, cached)
        began = self._run.began(stage.name)
        if began is not None:
            what = recall_commits(what, began)
            if self._change_of_steps(stage, began, what, inputs):
                return self._with_other_steps(stage, inputs, began, what, pending)
            refusal = self._change_refusal(stage, inputs, began, what, pending, changed)
            return Step(stage, "resume", "it has not finished", inputs, what, refusal=refusal)
        finished = self._finished_identity(stage)
        if finished is not None and self._change_of_steps(stage, finished, what, inputs) > 0:
            why_not = self._fixed_steps(stage)
            if why_not is None and not self._run.can_continue(stage.name, finished):
                why_not = "its last checkpoint was not kept"
            if why_not is None:
                return Step(stage, "resume", reason, inputs, what)
            reason = f"{reason}; from the first step, because {why_not}"
        return Step(stage, "run", reason, inputs, what)

    def _change_of_steps(self, stage: Stage, earlier: Identity, what: Identity, inputs: StageInputs) -> float:
        """Return by how much the number of steps changed, if nothing else did; else 0."""
        name = stage.steps_setting
        if name is None or PENDING in what["inputs"].values() or name not in earlier["settings"]:
            return 0
        before, now = earlier["settings"][name], what["settings"][name]
        as_before = {**what, "settings": {**what["settings"], name: before}}
        return 0 if differences(earlier, as_before, inputs) else now - before

    def _with_other_steps(
        self, stage: Stage, inputs: StageInputs, began: Identity, what: Identity, pending: frozenset[str]
    ) -> Step:
        """Plan an unfinished stage of which only the number of steps changed."""
        name, why_not = stage.steps_setting or "", self._fixed_steps(stage)
        reason, refusal = _listed(differences(began, what, inputs)), None
        if why_not is not None:
            what_is, before = f"that was started differently: {reason}; {why_not}", began["settings"][name]
            refusal = self._refusal(stage, pending, what_is, f"resume by `--set {name}={before}`")
        else:
            done, steps = steps_done(self._run.work(stage.name)), what["settings"][name]
            if done > steps:
                what_is = f"with {done:,} step{'' if done == 1 else 's'} done: {reason}"
                refusal = self._refusal(stage, pending, what_is, f"finish with those by `--set {name}={done}`")
            elif done == steps:
                reason += "; all of them are done, so that it finishes with what it has"
        return Step(stage, "resume", reason, inputs, what, refusal=refusal)

    def _fixed_steps(self, stage: Stage) -> str | None:
        return stage.fixed_steps(self._recipe.section(stage.name))

    def _finished(self, stage: Stage, inputs: StageInputs, what: Identity) -> tuple[Manifest | None, str]:
        """Return the manifest of a finished, unchanged, intact artifact; otherwise None and the reason to run."""
        try:
            manifest = self._run.read_manifest(stage.name)
            if manifest is None:
                return None, "it has not run yet"
            if found := differences(manifest.identity, what, inputs):
                return None, _listed(found)
            pending = [what["upstream"][name] for name, digest in what["inputs"].items() if digest == PENDING]
            if pending:
                return None, f"{' and '.join(f'`{name}`' for name in sorted(pending))} runs again"
            if manifest.fingerprint != fingerprint(what):
                return None, "another version of rlhf wrote it"
            manifest.verify(self._run.artifact(stage.name))
        except DamagedArtifact as damage:
            return None, f"damaged: {damage}"
        return manifest, ""

    def _change_refusal(
        self,
        stage: Stage,
        inputs: StageInputs,
        began: Identity,
        what: Identity,
        pending: frozenset[str],
        changed: frozenset[str],
    ) -> ChangedInputsError | None:
        """Return why an unfinished stage must not be resumed, if its settings or inputs changed."""
        found = differences(began, what, inputs)
        upstream = {given.upstream for given in inputs.by_name().values() if given.upstream} & changed
        found += [f"its input from `{name}` will change" for name in sorted(upstream)]
        if not found:
            return None
        if not began["settings"]:
            file = self._run.began_file(stage.name)
            found = [f"{file}, which records its settings, is missing or damaged"]
        return self._refusal(
            stage, pending, f"that was started differently: {_listed(found)}", "undo the change to resume"
        )

    def _refusal(self, stage: Stage, pending: frozenset[str], what: str, how: str) -> ChangedInputsError:
        """Return why an unfinished stage is not resumed.

        Args:
            stage: the stage.
            pending: names of stages that run before it.
            what: what is wrong with it, after its name.
            how: how to keep its work.
        """
        force = f"--force {stage.name}" if self._names_stages else "--force"
        return ChangedInputsError(
            f"{self._run.path} has an unfinished `{stage.name}` {what}",
            hint=f"{how}, or discard the unfinished work with `{force}`"
            + self._also_runs(stage, pending)
            + ("; human labels and paid verdicts are kept" if stage.name == "label" else ""),
        )

    def _also_runs(self, forced: Stage, pending: frozenset[str]) -> str:
        """Say which stages run if one is forced: those that would run before it, and those that read it."""
        running = {*pending, forced.name}
        for stage in self._chosen[self._chosen.index(forced) + 1 :]:
            read = {given.upstream for given in self.inputs(stage).by_name().values()}
            if read & running or self._finished_identity(stage) is None:
                running.add(stage.name)
        names = [stage.name for stage in self._chosen if stage.name in running]
        if len(names) < 2:
            return ""
        return f"; then {', '.join(f'`{name}`' for name in names[:-1])} and `{names[-1]}` run"


def _raise_refusal(step: Step) -> None:
    if step.refusal is not None:
        raise step.refusal


def _listed(found: list[str]) -> str:
    more = len(found) - _SHOWN_DIFFERENCES
    return "; ".join(found[:_SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
