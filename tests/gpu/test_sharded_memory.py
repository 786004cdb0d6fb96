"""Bytes that each of two ranks of a sharded run holds on a fake GPU: its part of the whole, and what is not divided.

Loading, the checkpoint and the artifact are included. gloo carries the messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.gpu.mutants import STALE, WHOLE
from tests.gpu.running import ROOT, Host, fake_gpus
from tests.scripts import load_script

RANKS = 2
RUNS: dict[str, dict[str, object]] = {
    "sft-none": {},
    "sft-lora": {},
    "ppo-none": {"ppo.prompts_per_step": RANKS, "ppo.max_new_tokens": 4},
    "ppo-lora": {"ppo.prompts_per_step": RANKS, "ppo.max_new_tokens": 4},
}
"""Stage and adapter -> settings that make the run shorter than the benchmark's."""


@pytest.fixture(scope="module")
def gpus() -> Iterator[Host]:
    """A host with a fake GPU for each rank."""
    with fake_gpus(RANKS) as host:
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


def peaks(gpus: Host, benchmark: ModuleType, folder: Path, run: str, **package: Path) -> tuple[list[int], float, str]:
    """Return the peak of each rank, the bound, and what was held at the peak of rank 0."""
    recipe = benchmark.recipe(folder, run, RANKS, "cuda")
    target = folder / f"run-{run}-{len(package)}"
    changes = [word for name, value in RUNS[run].items() for word in ("--set", f"{name}={value}")]
    outcomes = gpus.processes(folder, RANKS, run.split("-")[0], recipe, *changes, "--run-dir", target, **package)
    whole, rest = benchmark.counted(folder, run, RANKS, "cuda")
    held = sorted(outcomes[0].largest.items(), key=lambda item: -item[1])[:12]
    told = f"whole / ranks {whole / RANKS:,.0f}, not divided {rest:,.0f}, held: {held}"
    return [one.peak for one in outcomes], benchmark.SLACK * whole / RANKS + rest, told


@pytest.mark.parametrize("run", RUNS)
def test_each_rank_holds_its_part(run: str, gpus: Host, benchmark: ModuleType, folder: Path):
    found, bound, told = peaks(gpus, benchmark, folder, run)
    assert max(found) <= bound, (found, bound, told)
    assert min(found) > 0.5 * bound, (found, bound, told)


@pytest.mark.parametrize("run", RUNS)
def test_a_whole_copy_in_each_rank_exceeds_the_bound(
    run: str, gpus: Host, benchmark: ModuleType, folder: Path, tmp_path: Path
):
    mutated = WHOLE.apply(tmp_path)
    found, bound, told = peaks(gpus, benchmark, folder, run, package=mutated)
    assert min(found) > bound, (found, bound, told)


def test_a_weight_that_is_read_after_it_was_dropped_is_refused(
    gpus: Host, benchmark: ModuleType, folder: Path, tmp_path: Path
):
    """Blocks that stay whole after a pass without gradient are taken for the trained weights, and dropped later."""
    mutated = STALE.apply(tmp_path)
    recipe = benchmark.recipe(folder, "sft-none", RANKS, "cuda")
    found = gpus.processes(folder, RANKS, "sft", recipe, "--run-dir", folder / "run-stale", code=1, package=mutated)
    assert any("memory is freed" in one.stderr + one.raised for one in found)
