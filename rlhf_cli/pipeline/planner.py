"""What a run is going to do, and why, before it does anything."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from rlhf_cli.errors import ChangedInputsError, DataError, UsageError
from rlhf_cli.pipeline.fingerprint import PENDING, Digests, differences, fingerprint, identity
from rlhf_cli.pipeline.inputs import Input, InputResolver
from rlhf_cli.pipeline.manifest import DamagedArtifact, Identity, Manifest
from rlhf_cli.pipeline.run_directory import RunDirectory
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.base import STAGES, Stage

_SHOWN_DIFFERENCES = 5


@dataclass(frozen=True)
class Step:
    """One stage of a plan.

    Attributes:
        stage: which.
        action: "run" from its start, "resume" from its last checkpoint, or "cached": finished and unchanged.
        reason: why, for people.
        inputs: what it reads.
        identity: what its result depends on; holds `PENDING` digests where an earlier stage has to write first.
        manifest: of the finished artifact, with "cached".
    """

    stage: Stage
    action: Literal["run", "resume", "cached"]
    reason: str
    inputs: list[Input]
    identity: Identity
    manifest: Manifest | None = None

    @property
    def waits(self) -> bool:
        """Whether an earlier stage has to run before it is known what this one needs."""
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
    present = [stage for stage in STAGES if getattr(recipe, stage.section) is not None]
    names = [stage.name for stage in present]
    if not present:
        raise UsageError(
            "the recipe has no stage to run", hint=f"add a section: {', '.join(row.section for row in STAGES)}"
        )
    for option, name in (
        ("--from", selection.first),
        ("--to", selection.last),
        *(("--force", f) for f in selection.force),
    ):
        if name is not None:
            _known(option, name, names)
    begin = names.index(selection.first) if selection.first else 0
    end = names.index(selection.last) + 1 if selection.last else len(names)
    if begin >= end:
        raise UsageError(f"`--from {selection.first}` comes after `--to {selection.last}`")
    chosen = present[begin:end]
    for name in sorted(selection.force - {stage.name for stage in chosen}):
        raise UsageError(f"`--force {name}` is outside of the stages chosen by --from and --to")
    return chosen


def _known(option: str, name: str, names: list[str]) -> None:
    if name in names:
        return
    if name.replace("_", "-") in names:
        raise UsageError(f"`{option} {name}`: the stage is called `{name.replace('_', '-')}`")
    if name in {stage.name for stage in STAGES}:
        raise UsageError(f"`{option} {name}`: the recipe has no such stage", hint=f"it has {', '.join(names)}")
    raise UsageError(f"`{option} {name}`: no such stage", hint=f"stages are {', '.join(row.name for row in STAGES)}")


_FROM = {
    "label": {"sft": "model"},
    "train-rm": {"sft": "model", "label": "data"},
    "ppo": {"sft": "model", "train-rm": "reward_model"},
}
"""Stage -> earlier stage it reads -> the setting that names something else instead."""


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
        self._resolver = InputResolver(recipe, run, frozenset(stage.name for stage in chosen))
        self._digests = Digests(recipe, run)

    def plan(self) -> list[Step]:
        """A step for each chosen stage. Raises for a missing input of any before it looks closer at the first."""
        inputs = {stage.name: self._resolver.inputs(stage) for stage in self._chosen}
        self._check_taken(given for all_of_one in inputs.values() for given in all_of_one)
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

    def _check_taken(self, inputs: Iterable[Input]) -> None:
        """Artifacts that are read and not made here must be what their manifests say."""
        made = {stage.name for stage in self._chosen}
        for name in sorted({given.upstream for given in inputs if given.upstream} - made):
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
        """A taken artifact must have been made from what lies beside it now: an adapter fits its own base alone."""
        section = manifest.settings.get(name.replace("-", "_")) or {}
        for upstream, setting in _FROM.get(name, {}).items():
            recorded = manifest.identity["inputs"].get(upstream)
            beside = self._run.read_manifest(upstream)
            if section.get(setting) is not None or recorded is None or beside is None:
                continue
            if recorded != beside.content_digest:
                raise UsageError(
                    f"`{name}` in {self._run.path} was made from another `{upstream}` than the one beside it now",
                    hint=f"make it again: leave out --from, or run `rlhf {name}` on this run directory",
                )

    def _differs(self, step: Step) -> bool:
        """Whether what a stage is going to write differs from what later stages may have begun with."""
        known = self._run.began(step.stage.name) if step.action == "resume" else self._finished_identity(step.stage)
        return known is not None and bool(differences(known, step.identity))

    def _finished_identity(self, stage: Stage) -> Identity | None:
        try:
            manifest = self._run.read_manifest(stage.name)
        except DamagedArtifact:
            return None
        return None if manifest is None else manifest.identity

    def _look(self, stage: Stage, inputs: list[Input], pending: frozenset[str], changed: frozenset[str]) -> Step:
        what = identity(stage, self._recipe, inputs, self._digests, pending)
        if stage.name in self._force:
            return Step(stage, "run", "forced", inputs, what)
        cached, reason = self._finished(stage, what)
        if cached is not None:
            return Step(stage, "cached", "unchanged", inputs, what, cached)
        began = self._run.began(stage.name)
        if began is not None:
            self._same_or_refuse(stage, began, what, changed)
            return Step(stage, "resume", "goes on from where it stopped", inputs, what)
        return Step(stage, "run", reason, inputs, what)

    def _finished(self, stage: Stage, what: Identity) -> tuple[Manifest | None, str]:
        """The manifest of a finished, unchanged, undamaged artifact; else None and the reason to run."""
        try:
            manifest = self._run.read_manifest(stage.name)
            if manifest is None:
                return None, "nothing is there yet"
            if found := differences(manifest.identity, what):
                return None, _listed(found)
            if waits := sorted(name for name, digest in what["inputs"].items() if digest == PENDING):
                writers = [given.upstream for given in self._resolver.inputs(stage) if given.name in waits]
                return None, f"reads what {' and '.join(f'`{name}`' for name in writers)} writes anew"
            if manifest.fingerprint != fingerprint(what):
                return None, "its fingerprint differs"
            manifest.verify(self._run.artifact(stage.name))
        except DamagedArtifact as damage:
            return None, f"damaged: {damage}"
        return manifest, ""

    def _same_or_refuse(self, stage: Stage, began: Identity, what: Identity, changed: frozenset[str]) -> None:
        found = differences(began, what)
        upstream = {given.upstream for given in self._resolver.inputs(stage)} & changed
        found += [f"`{name}`, which it reads, is made anew and differently" for name in sorted(filter(None, upstream))]
        if not found:
            return
        if not began["settings"]:
            file = self._run.began_file(stage.name)
            found = [f"the record of what it began with is lost ({file} is missing or damaged)"]
        raise ChangedInputsError(
            f"{self._run.path} has an unfinished `{stage.name}` that began differently: {_listed(found)}",
            hint=f"set it back to go on, or throw the unfinished work away with `--force {stage.name}`"
            + ("; people's labels and paid verdicts are kept" if stage.name == "label" else ""),
        )


def _listed(found: list[str]) -> str:
    more = len(found) - _SHOWN_DIFFERENCES
    return "; ".join(found[:_SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
