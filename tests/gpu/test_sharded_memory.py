"""Bytes that each rank of a sharded run holds on a fake GPU: its part of the whole, and what is not divided.

Loading, checkpoints, resuming and the artifact are included. gloo carries the messages.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.gpu.mutants import STALE, WHOLE
from tests.gpu.running import ROOT, Host, Outcome, fake_gpus
from tests.scripts import load_script

SHORT = {
    "sft": {},
    "train-rm": {"sampling.max_new_tokens": 4},
    "ppo": {"ppo.prompts_per_step": 2, "ppo.max_new_tokens": 4},
}
"""Stage -> settings that make the run shorter than the benchmark's."""
RUNS = [f"{stage}-{adapter}" for stage in SHORT for adapter in ("none", "lora")]
RANKS = 2


@pytest.fixture(scope="module")
def gpus() -> Iterator[Host]:
    """A host with a fake GPU for each rank."""
    with fake_gpus(4) as host:
        yield host


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The script that measures the same on CPUs."""
    return load_script(ROOT / "benchmarks" / "sharding_memory.py")


@pytest.fixture(scope="module")
def folder(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of all runs, with models of 1.4 million weights, 5.5 MB."""
    made = tmp_path_factory.mktemp("inputs")
    benchmark.make_inputs(made, hidden=128, layers=6)
    return made


def start(
    gpus: Host,
    benchmark: ModuleType,
    folder: Path,
    run: str,
    ranks: int,
    name: str,
    settings: dict[str, object] | None = None,
    **how: object,
) -> list[Outcome]:
    """Start a run, or resume it; returns what each rank did."""
    stage = run.rsplit("-", 1)[0]
    settings = SHORT[stage] | (settings or {})
    changes = [word for setting, value in settings.items() for word in ("--set", f"{setting}={value}")]
    recipe = benchmark.recipe(folder, run, ranks, "cuda")
    return gpus.processes(folder, ranks, stage, recipe, *changes, "--run-dir", folder / name, **how)


def peaks(benchmark: ModuleType, folder: Path, run: str, outcomes: list[Outcome]) -> tuple[list[int], float, str]:
    """Return the peak of each rank, the bound of the phase that may hold most, and what was held at rank 0's peak."""
    phases = benchmark.counted(folder, run, len(outcomes), "cuda").values()
    bound, part, rest = max(
        (benchmark.SLACK * whole / len(outcomes) + rest, whole / len(outcomes), rest) for whole, rest in phases
    )
    held = sorted(outcomes[0].largest.items(), key=lambda item: -item[1])[:12]
    found = [one.peak for one in outcomes]
    told = f"peaks {found}, whole / ranks {part:,.0f}, not divided {rest:,.0f}, bound {bound:,.0f}, held: {held}"
    print(f"{run} on {len(outcomes)}: {told}")  # shown by `pytest -rP`
    return found, bound, told


CELLS = [pytest.param(run, ranks, id=f"{run} on {ranks}") for ranks in (2, 4) for run in RUNS]


@pytest.mark.parametrize(("run", "ranks"), CELLS)
def test_each_rank_holds_its_part(run: str, ranks: int, gpus: Host, benchmark: ModuleType, folder: Path):
    outcomes = start(gpus, benchmark, folder, run, ranks, f"run-{run}-{ranks}")
    found, bound, told = peaks(benchmark, folder, run, outcomes)
    assert max(found) <= bound, told
    assert min(found) > 0.5 * bound, told


FOUR_STEPS = {"sft-none": {"sft.epochs": 1}, "ppo-none": {"ppo.steps": 4}}
"""The signal is handled after step 1, 2 or 3, so that a step is left for the resumed run."""


@pytest.mark.parametrize("run", FOUR_STEPS)
def test_a_resumed_rank_holds_its_part(run: str, gpus: Host, benchmark: ModuleType, folder: Path):
    name, settings = f"resumed-{run}", FOUR_STEPS[run]
    step = folder / name / f".{run.rsplit('-', 1)[0]}.work" / "step-00000001"
    start(gpus, benchmark, folder, run, RANKS, name, settings, stop_after=step, code=128 + signal.SIGTERM)
    outcomes = start(gpus, benchmark, folder, run, RANKS, name, settings)
    assert re.search(r"resuming from step [123] of 4", outcomes[0].stderr), outcomes[0].stderr
    found, bound, told = peaks(benchmark, folder, run, outcomes)
    assert max(found) <= bound, told
    assert min(found) > 0.5 * bound, told


@pytest.mark.parametrize("run", [run for run in RUNS if run != "train-rm-none"])  # whose bound has room for one copy
def test_a_whole_copy_in_each_rank_exceeds_the_bound(
    run: str, gpus: Host, benchmark: ModuleType, folder: Path, tmp_path: Path
):
    outcomes = start(gpus, benchmark, folder, run, RANKS, f"whole-{run}", package=WHOLE.apply(tmp_path))
    found, bound, told = peaks(benchmark, folder, run, outcomes)
    assert min(found) > bound, told


def test_a_weight_that_is_read_after_it_was_dropped_is_refused(
    gpus: Host, benchmark: ModuleType, folder: Path, tmp_path: Path
):
    """Blocks that stay whole after a pass without gradient are taken for the trained weights, and dropped later."""
    mutated = STALE.apply(tmp_path)
    recipe = benchmark.recipe(folder, "sft-none", RANKS, "cuda")
    found = gpus.processes(folder, RANKS, "sft", recipe, "--run-dir", folder / "run-stale", code=1, package=mutated)
    assert any("memory is freed" in one.stderr + one.raised for one in found)
