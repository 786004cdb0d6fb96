"""Compare evaluated runs: groups that differ in settings, each of one or several seeds, on the same prompts.

It reads what `evaluate` wrote, and computes nothing anew. Only figures that mean the same in all runs are compared:
gold scores if all come from one judge function, rewards if all come from one reward model.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cli.errors import DataError, UsageError
from rlhf_cli.intervals import Measure, joint_level
from rlhf_cli.pipeline.evaluated_run import EvaluatedRun, read_evaluated_run
from rlhf_cli.statistics.seeds import GroupDifference, group_difference

MEASURES: Mapping[str, str] = {
    "gold": "gold score",
    "reward": "reward",
    "preferred": "preferred to its baseline",
    "kl": "KL to its baseline, nats",
    "tokens": "length in tokens",
    "finished": "finished",
}
"""Name -> what it measures, in the order in which they decide and are shown."""

SHARES = ("preferred", "finished")
"""Measures that are shares; differences of shares are in percentage points."""

_BETTER = ("gold", "reward", "preferred")
"""Measures of which more is better."""

_RELATIVE = ("preferred", "kl")
"""Measures of a policy relative to its baseline."""
_SOURCES = {"gold": ("judge_function", "judge functions"), "reward": ("reward_model", "reward models")}


@dataclass(frozen=True)
class Group:
    """Runs with the same settings.

    Attributes:
        name: what distinguishes it from the other groups.
        runs: in the order of their seeds.
    """

    name: str
    runs: tuple[EvaluatedRun, ...]

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs, in ascending order."""
        return [run.seed for run in self.runs]


@dataclass(frozen=True)
class PairOfGroups:
    """Two groups compared.

    Attributes:
        first: name of the first group.
        second: name of the second group.
        measures: measure -> difference, second - first, with 95 % intervals for this pair alone.
        says: what can be told, in a sentence; it holds for all pairs of the comparison together.
        better: name of the better group, also for other prompts and seeds; None if that cannot be told.
    """

    first: str
    second: str
    measures: Mapping[str, GroupDifference]
    says: str
    better: str | None = None


@dataclass(frozen=True)
class RunComparison:
    """All groups compared with the first.

    Attributes:
        groups: in the order of the command line.
        prompts: number of prompts that all runs were evaluated on.
        pairs: first group with each other.
        notes: what is not compared, and why.
    """

    groups: tuple[Group, ...]
    prompts: int
    pairs: tuple[PairOfGroups, ...]
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints; every difference has its intervals."""
        return {
            "prompts": self.prompts,
            "groups": [
                {"name": group.name, "runs": [str(run.folder) for run in group.runs], "seeds": group.seeds}
                for group in self.groups
            ],
            "comparisons": [
                {
                    "first": pair.first,
                    "second": pair.second,
                    "says": pair.says,
                    "better": pair.better,
                    "measures": {name: _as_json(difference) for name, difference in pair.measures.items()},
                }
                for pair in self.pairs
            ],
            "notes": list(self.notes),
        }


def _as_json(difference: GroupDifference) -> dict[str, Any]:
    intervals = {"prompts": difference.prompts, "seeds": difference.seeds, "both": difference.both}
    return {"first": difference.first, "second": difference.second} | {
        f"difference_over_{name}": measure.to_json() for name, measure in intervals.items()
    }


def compare_runs(names: Sequence[str]) -> RunComparison:
    """Compare runs.

    Args:
        names: run directories. Runs whose settings differ in nothing but the seed are a group; a name with commas is a
            group of the runs in it, whatever their settings.

    Raises:
        UsageError: there are not two groups, or a run is not evaluated.
        DataError: an evaluation is damaged, or the runs have no prompt in common.
    """
    groups = _groups(names)
    runs = [run for group in groups for run in group.runs]
    common = set.intersection(*(set(run.scores) for run in runs))
    if not common:
        raise DataError(
            f"{runs[0].folder} and the other runs were evaluated on different prompts: none is in all of them",
            hint="evaluate them on the same prompts with `--set evaluate.prompts=PATH`",
        )
    prompts = sorted(common)
    notes = [*_notes(runs), *_dropped(runs, common)]
    measures = [name for name in MEASURES if _is_comparable(runs, name, prompts)]
    pairs = [_pair(groups[0], other, measures, prompts, len(groups) - 1) for other in groups[1:]]
    return RunComparison(tuple(groups), len(prompts), tuple(pairs), tuple(notes))


def _groups(names: Sequence[str]) -> list[Group]:
    if len(names) < 2:
        raise UsageError(
            f"there is one run to compare: {names[0]}", hint="name two or more: `rlhf compare runs/a runs/b`"
        )
    given = [[Path(part).expanduser() for part in name.split(",") if part] for name in names]
    if any("," in name for name in names):
        grouped = [[read_evaluated_run(folder) for folder in parts] for parts in given]
    else:
        found: dict[str, list[EvaluatedRun]] = defaultdict(list)
        for (folder,) in given:
            run = read_evaluated_run(folder)
            found[json.dumps(run.settings, sort_keys=True)].append(run)
        grouped = list(found.values())
    if len(grouped) < 2:
        raise UsageError(
            f"the settings of {' and '.join(names)} differ in nothing but the seed, so there is nothing to compare",
            hint="name the groups yourself, with commas: `rlhf compare runs/a-0,runs/a-1 runs/b-0,runs/b-1`",
        )
    for runs in grouped:
        _check_seeds(runs)
    titles = _titles([runs[0].settings for runs in grouped], grouped)
    return [
        Group(title, tuple(sorted(runs, key=lambda run: run.seed))) for title, runs in zip(titles, grouped, strict=True)
    ]


def _check_seeds(runs: Sequence[EvaluatedRun]) -> None:
    """Raise if two runs of a group are the same training run: an interval over seeds would be too narrow."""
    seen: dict[int, EvaluatedRun] = {}
    for run in runs:
        if (other := seen.setdefault(run.seed, run)) is not run:
            raise UsageError(
                f"{other.folder} and {run.folder} are in one group and have the same seed ({run.seed})",
                hint="give each run of a group another `--seed`, or name one of them",
            )


def _titles(settings: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[EvaluatedRun]]) -> list[str]:
    """Name the groups by the settings in which they differ, or by their folders if these are many or none."""
    names = {name for one in settings for name in one}
    differing = sorted(name for name in names if len({json.dumps(one.get(name)) for one in settings}) > 1)
    if not 0 < len(differing) <= 3:
        return [", ".join(run.folder.name for run in runs) for runs in groups]
    return [", ".join(f"{name} {json.dumps(one.get(name))}" for name in differing) for one in settings]


def _is_comparable(runs: Sequence[EvaluatedRun], name: str, prompts: Sequence[str]) -> bool:
    """Whether every run has this measure on all prompts, by the same function or model."""
    if not all(name in run.scores[prompt] for run in runs for prompt in prompts):
        return False
    if name in _SOURCES:
        return len({run.inputs.get(_SOURCES[name][0]) for run in runs}) == 1
    return name not in _RELATIVE or _has_equal_baselines(runs, is_judged=name == "preferred")


def _has_equal_baselines(runs: Sequence[EvaluatedRun], *, is_judged: bool) -> bool:
    """Whether runs of equal seeds have the same baseline and, if that matters, the same judge; all runs otherwise."""

    def source(run: EvaluatedRun) -> tuple[tuple[str, str], ...]:
        judges = {name for name in run.inputs if name.startswith("judge")} or {"reward_model"}
        names = {"baseline", *(judges if is_judged else ())}
        return tuple(sorted((name, digest) for name, digest in run.inputs.items() if name in names))

    by_seed: dict[int, set[Any]] = defaultdict(set)
    for run in runs:
        by_seed[run.seed].add(source(run))
    return all(len(found) == 1 for found in by_seed.values()) and (
        len(set().union(*by_seed.values())) == 1 or all(_count(runs, seed) > 1 for seed in by_seed)
    )


def _count(runs: Sequence[EvaluatedRun], seed: int) -> int:
    return sum(run.seed == seed for run in runs)


def _notes(runs: Sequence[EvaluatedRun]) -> list[str]:
    return [
        f"{MEASURES[name]}s are not compared: they come from different {what}"
        for name, (given, what) in _SOURCES.items()
        if all(run.inputs.get(given) for run in runs) and len({run.inputs[given] for run in runs}) > 1
    ] + [
        f"`{MEASURES[name]}` is not compared: runs with the same seed have different baselines or judges"
        for name in _RELATIVE
        if not _has_equal_baselines(runs, is_judged=name == "preferred")
    ]


def _dropped(runs: Sequence[EvaluatedRun], common: set[str]) -> list[str]:
    everything = set.union(*(set(run.scores) for run in runs))
    left = len(everything) - len(common)
    return [f"{left:,} of {len(everything):,} prompts are skipped: not all runs were evaluated on them"] if left else []


def _pair(
    first: Group, second: Group, measures: Sequence[str], prompts: Sequence[str], comparisons: int
) -> PairOfGroups:
    def difference(name: str, level: float) -> GroupDifference:
        scores = (
            np.array([[run.scores[prompt][name] for prompt in prompts] for run in group.runs])
            for group in (first, second)
        )
        return group_difference(*scores, is_paired=first.seeds == second.seeds, level=level)

    found = {name: difference(name, joint_level(1)) for name in measures}
    decides = next((name for name in _BETTER if name in measures), None)
    if decides is None:
        says = "nothing says which is better: the runs share neither a judge function nor a reward model nor baselines"
        return PairOfGroups(first.name, second.name, found, says)
    joint = difference(decides, joint_level(comparisons))
    better = None
    if _excludes_0(joint.both):
        better = second.name if joint.second > joint.first else first.name
    says = _sentence(first, second, decides, joint, len(prompts))
    if comparisons > 1:
        says += f"; 95% holds for all {comparisons} comparisons together"
    return PairOfGroups(first.name, second.name, found, says, better)


def _sentence(first: Group, second: Group, name: str, found: GroupDifference, prompts: int) -> str:
    """Say which group is better, how sure that is, and what it does not hold for."""
    size = found.second - found.first
    better, other = (second.name, first.name) if size > 0 else (first.name, second.name)
    by = f"higher than {other} by {_size(name, abs(size))} ({MEASURES[name]})"
    runs = min(len(first.runs), len(second.runs))
    if _excludes_0(found.both):
        return f"{better} scores {by}, also for other prompts and other seeds (95% intervals)"
    if not _excludes_0(found.prompts):
        return (
            f"no difference in {MEASURES[name]} can be detected with {prompts:,} prompts: {span(name, found.prompts)}"
        )
    if found.seeds.low is None:
        return f"{better} scores {by} in these runs; with one run per group, other seeds may order them differently"
    return (
        f"{better} scores {by} in these runs; {runs} seeds per group are too few to say so for other seeds: "
        f"{span(name, found.both)}"
    )


def _excludes_0(measure: Measure) -> bool:
    return measure.low is not None and measure.high is not None and not measure.low <= 0.0 <= measure.high


def _size(name: str, difference: float) -> str:
    """Return a difference for people, with its sign only if it is negative."""
    return f"{100 * difference:.1f} points" if name in SHARES else f"{difference:.3g}"


def signed(name: str, difference: float) -> str:
    """Return a difference for people; that of a share in percentage points."""
    return f"{100 * difference:+.1f}" if name in SHARES else f"{difference:+.3g}"


def span(name: str, measure: Measure) -> str:
    """Return the interval of a difference for people, "" without one."""
    if measure.low is None or measure.high is None:
        return ""
    unit = " points" if name in SHARES else ""
    return f"{signed(name, measure.low)} to {signed(name, measure.high)}{unit}"
