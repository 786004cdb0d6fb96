"""What a run is going to do, and why, before it does anything."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rlhf_cli.errors import ChangedInputsError, DataError, UsageError
from rlhf_cli.pipeline.fingerprint import PENDING, Digests, differences, fingerprint, identity
from rlhf_cli.pipeline.manifest import DamagedArtifact, Identity, Manifest
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages import registry
from rlhf_cli.stages.base import Stage
from rlhf_cli.stages.inputs import InputFinder, StageInputs

_SHOWN_DIFFERENCES = 5


@dataclass(frozen=True)
class Step:
    """One stage of a plan.

    Attributes:
        stage: which.
        action: "run" from its start, "resume" from its last checkpoint, or "cached": finished and unchanged.
        reason: why, for people.
        inputs: what it reads.
        identity: what its result depends on; holds `PENDING` digests where an earlier stage must write first.
        manifest: of the finished artifact, with "cached".
    """

    stage: Stage
    action: Literal["run", "resume", "cached"]
    reason: str
    inputs: StageInputs
    identity: Identity
    manifest: Manifest | None = None

    @property
    def waits(self) -> bool:
        """Whether an earlier stage must run before it is known what this one needs."""
        return PENDING in self.identity["inputs"].values()


@dataclass(frozen=True)
class Selection:
    """Which stages the command line asks for.

    Attributes:
        first: `--from`; None is the recipe's first.
        last: `--to`; None is its last.
        force: stages that run again, done or not.
    """

    first: str | None = None
    last: str | None = None
    force: frozenset[str] = field(default_factory=frozenset)


def select(recipe: Recipe, selection: Selection) -> list[Stage]:
    """The stages to bring up to date, in order; raises `UsageError` for names that do not fit the recipe."""
    present = [stage for stage in registry.stages() if recipe.section(stage.name) is not None]
    names = [stage.name for stage in present]
    if not present:
        sections = ", ".join(stage.section for stage in registry.stages())
        raise UsageError("the recipe has no stage to run", hint=f"add a section: {sections}")
    asked = [("--from", selection.first), ("--to", selection.last), *(("--force", f) for f in selection.force)]
    for option, name in asked:
        if name is not None:
            _check_name(option, name, names)
    begin = names.index(selection.first) if selection.first else 0
    end = names.index(selection.last) + 1 if selection.last else len(names)
    if begin >= end:
        raise UsageError(f"`--from {selection.first}` comes after `--to {selection.last}`")
    chosen = present[begin:end]
    for name in sorted(selection.force - {stage.name for stage in chosen}):
        raise UsageError(f"`--force {name}` is outside of the stages chosen by --from and --to")
    return chosen


def _check_name(option: str, name: str, names: list[str]) -> None:
    if name in names:
        return
    if name.replace("_", "-") in names:
        raise UsageError(f"`{option} {name}`: the stage is called `{name.replace('_', '-')}`")
    if name in registry.REGISTRY:
        raise UsageError(f"`{option} {name}`: the recipe has no such stage", hint=f"it has {', '.join(names)}")
    raise UsageError(f"`{option} {name}`: no such stage", hint=f"stages are {', '.join(registry.REGISTRY)}")


@dataclass(frozen=True)
class RunArtifacts:
    """The artifacts of a run, finished or planned: see `stages.inputs.Artifacts`.

    Attributes:
        run: the run directory, whose finished artifacts count.
        planned: names of stages that write their artifacts before they are read.
    """

    run: RunDirectory
    planned: frozenset[str]

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return self.run.path

    def folder(self, stage: str) -> Path:
        """Where a stage's artifact is or will be."""
        return self.run.artifact(stage)

    def has(self, stage: str) -> bool:
        """Whether the artifact exists, or is written before it is read."""
        return stage in self.planned or self.run.artifact(stage).is_dir()

    def writes(self, stage: str) -> str:
        """What the stage's artifact is."""
        return registry.stage(stage).writes


class Planner:
    """Looks at the recipe and the run directory and says what each stage needs.

    Args:
        recipe: with paths resolved.
        run: the run directory.
        chosen: stages to bring up to date, in order.
        force: names of stages that run again.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory, chosen: list[Stage], force: frozenset[str]) -> None:
        self._recipe = recipe
        self._run = run
        self._chosen = chosen
        self._force = force
        self._artifacts = RunArtifacts(run, frozenset(stage.name for stage in chosen))
        self._digests = Digests(recipe, run)

    def plan(self) -> list[Step]:
        """A step per chosen stage. Every stage's inputs are found before the first stage is looked at more closely.

        Raises:
            UsageError: an input is missing, or an artifact that is read is not up to date.
            DataError: an artifact that is read is damaged.
            ChangedInputsError: an unfinished stage began with other settings or inputs.
        """
        inputs = {stage.name: self._inputs(stage) for stage in self._chosen}
        self._check_artifacts_read(inputs.values())
        steps: list[Step] = []
        pending: frozenset[str] = frozenset()
        changed: frozenset[str] = frozenset()
        for stage in self._chosen:
            step = self._look(stage, inputs[stage.name], pending, changed)
            steps.append(step)
            if step.action != "cached":
                pending |= {stage.name}
                if self._differs(step):
                    changed |= {stage.name}
        return steps

    def again(self, step: Step) -> Step:
        """Look at a stage again, now that the stages before it are done."""
        return self._look(step.stage, step.inputs, frozenset(), frozenset())

    def _inputs(self, stage: Stage) -> StageInputs:
        finder = InputFinder(stage.name, self._recipe, self._artifacts)
        return stage.inputs(self._recipe.section(stage.name), self._recipe, finder)

    def _check_artifacts_read(self, inputs: Iterable[StageInputs]) -> None:
        """Artifacts that are read and not written by this run must be what their manifests say."""
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
                    hint=f"make it again: leave out --from, or run `rlhf {name}` on this run directory",
                ) from None

    def _check_current(self, name: str, manifest: Manifest) -> None:
        """An artifact must have been made from what is beside it now: an adapter fits its own base alone."""
        for field_name, upstream in manifest.identity["upstream"].items():
            beside = self._run.read_manifest(upstream)
            if beside is not None and manifest.identity["inputs"][field_name] != beside.content_digest:
                raise UsageError(
                    f"`{name}` in {self._run.path} was made from another `{upstream}` than the one beside it now",
                    hint=f"make it again: leave out --from, or run `rlhf {name}` on this run directory",
                )

    def _differs(self, step: Step) -> bool:
        """Whether what a stage is going to write differs from what later stages may have begun with."""
        known = self._run.began(step.stage.name) if step.action == "resume" else self._finished_identity(step.stage)
        return known is not None and bool(differences(known, step.identity, step.inputs))

    def _finished_identity(self, stage: Stage) -> Identity | None:
        try:
            manifest = self._run.read_manifest(stage.name)
        except DamagedArtifact:
            return None
        return None if manifest is None else manifest.identity

    def _look(self, stage: Stage, inputs: StageInputs, pending: frozenset[str], changed: frozenset[str]) -> Step:
        what = identity(stage, self._recipe, inputs, self._digests, pending)
        if stage.name in self._force:
            return Step(stage, "run", "forced", inputs, what)
        cached, reason = self._finished(stage, inputs, what)
        if cached is not None:
            return Step(stage, "cached", "unchanged", inputs, what, cached)
        began = self._run.began(stage.name)
        if began is not None:
            self._same_or_refuse(stage, inputs, began, what, changed)
            return Step(stage, "resume", "resumes from where it stopped", inputs, what)
        return Step(stage, "run", reason, inputs, what)

    def _finished(self, stage: Stage, inputs: StageInputs, what: Identity) -> tuple[Manifest | None, str]:
        """The manifest of a finished, unchanged, undamaged artifact; else None and the reason to run."""
        try:
            manifest = self._run.read_manifest(stage.name)
            if manifest is None:
                return None, "it has not run yet"
            if found := differences(manifest.identity, what, inputs):
                return None, _listed(found)
            waits = [what["upstream"][name] for name, digest in what["inputs"].items() if digest == PENDING]
            if waits:
                return None, f"reads what {' and '.join(f'`{name}`' for name in sorted(waits))} writes again"
            if manifest.fingerprint != fingerprint(what):
                return None, "its fingerprint differs"
            manifest.verify(self._run.artifact(stage.name))
        except DamagedArtifact as damage:
            return None, f"damaged: {damage}"
        return manifest, ""

    def _same_or_refuse(
        self, stage: Stage, inputs: StageInputs, began: Identity, what: Identity, changed: frozenset[str]
    ) -> None:
        found = differences(began, what, inputs)
        upstream = {given.upstream for given in inputs.by_name().values() if given.upstream} & changed
        found += [f"`{name}`, which it reads, changes" for name in sorted(upstream)]
        if not found:
            return
        if not began["settings"]:
            file = self._run.began_file(stage.name)
            found = [f"the record of what it began with is lost ({file} is missing or damaged)"]
        raise ChangedInputsError(
            f"{self._run.path} has an unfinished `{stage.name}` that began differently: {_listed(found)}",
            hint=f"set it back to resume, or discard the unfinished work with `--force {stage.name}`"
            + ("; people's labels and paid verdicts are kept" if stage.name == "label" else ""),
        )


def _listed(found: list[str]) -> str:
    more = len(found) - _SHOWN_DIFFERENCES
    return "; ".join(found[:_SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
