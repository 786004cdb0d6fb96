"""`model.sharding: fsdp` over several processes equals one process; what it does not support is refused by name."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.sharding import check_sharding, require_processes
from tests.distributed.sharded import CLIPPED
from tests.distributed.sharded_models import make_model
from tests.preloaded import start

CASES = {
    2: (
        "sft-llama-none",
        "sft-llama-none-clipped",
        "sft-llama-none-bfloat16",
        "sft-qwen3-lora",
        "sft-gemma3_text-none",
        "sft-t5-none",
        "sft-built-none",
        "sft-qwen3_moe-none",
        "sft-qwen3_moe-lora",
        "resume-llama-none",
        "reward-llama-lora",
        "reward-qwen3-none",
        "ppo-llama-none",
        "ppo-llama-lora-shared",
        "ppo-qwen3-lora",
        "ppo-t5-none",
        "ppo-llama-none-adapter",
        "ppo-qwen3-none-classifier",
        "ppo-llama-none-criticadapter",
        "ppo-gemma3_text-none-criticfull",
        "ppo-qwen3_moe-none-adapter",
    ),
    4: (
        "sft-gemma3_text-none",
        "sft-t5-lora",
        "resume-llama-none",
        "reward-qwen3-lora",
        "ppo-t5-lora",
        "ppo-qwen3-none",
    ),
}
"""Number of processes -> cases of `sharded.py`."""
CELLS = [(count, case) for count, cases in CASES.items() for case in cases]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], dict]:
    """What the processes, which import the libraries once for all cases, wrote for each case."""
    results = {}
    for count, cases in CASES.items():
        folder = tmp_path_factory.mktemp(f"sharded-{count}")
        for family in sorted({case.split("-")[1] for case in cases}):
            make_model(family, folder / family)
        launch(folder, cases, count)
        results |= {(count, case): json.loads((folder / f"{case}.json").read_text()) for case in cases}
    return results


def started_by_rank(script: str, arguments: Sequence[object], count: int) -> list:
    """Start a script of this folder in several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, shared = Path(__file__).with_name(script), {"MASTER_PORT": port, "RLHF_JOIN_SECONDS": 600}
    return [
        start(arguments, program=program, env=environment(count, RANK=rank, LOCAL_RANK=rank, **shared))
        for rank in range(count)
    ]


def launch(folder: Path, cases: Sequence[str], count: int) -> None:
    """Run cases in several processes."""
    wait_for(started_by_rank("sharded.py", [folder, *cases], count))


def wait_for(started: Sequence) -> None:
    """Wait until all processes have ended without an error."""
    try:
        for process in started:
            stdout, stderr = process.communicate(timeout=900)
            assert process.returncode == 0, stdout + stderr
    finally:
        for process in started:
            if process.poll() is None:  # it waits for one that has failed
                process.send_signal(signal.SIGKILL)


def environment(count: int, **more: object) -> dict[str, str]:
    fixed = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count)}
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **fixed, **{k: str(v) for k, v in more.items()}}


@pytest.mark.parametrize("how", ["skip", "pass"])
def test_a_process_that_makes_a_pass_less_than_the_others_ends_at_once(how: str, tmp_path: Path):
    """The others would wait for it in a message that never comes; they lose it, and end too."""
    make_model("llama", tmp_path / "llama")
    first, second = started_by_rank("missing_pass.py", [tmp_path / "llama", how], 2)
    try:
        _, said = second.communicate(timeout=300)
        first.communicate(timeout=120)
    finally:
        for process in (first, second):
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    assert (second.returncode == 0) is (first.returncode == 0) is (how == "pass"), said
    expected = "process 1 passed over 1 parts of a sharded model's work, and the others over 2: they would wait for it"
    assert (expected in said) is (how == "skip")


@pytest.mark.parametrize("place", ["engine 1 fails", "checkpoint 0 fails", "checkpoint 1 fails", "engine 1 early"])
def test_a_process_that_fails_to_gather_ends_at_once_and_one_that_uses_less_takes_part(place: str, tmp_path: Path):
    """The others are in the middle of a message: an error that all agree on would wait for them."""
    make_model("llama", tmp_path / "llama")
    started = started_by_rank("failing_gathering.py", [tmp_path / "llama", *place.split()], 2)
    failing, other = started if " 0 " in place else started[::-1]
    try:
        _, said = failing.communicate(timeout=300)
        other.communicate(timeout=30)
    finally:
        for process in (failing, other):
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    fails = place.endswith("fails")
    assert (failing.returncode != 0) is (other.returncode != 0) is fails, said
    assert ("torch.OutOfMemoryError: CUDA out of memory while gathering" in said) is fails


def cells(*stages: str, exact: bool = True) -> list:
    chosen = [cell for cell in CELLS if cell[1].split("-")[0] in stages and not (exact and "bfloat16" in cell[1])]
    return [pytest.param(cell, id=f"{cell[1]}, {cell[0]} processes") for cell in chosen]


@pytest.mark.parametrize("cell", cells("sft", "reward", "ppo"))
def test_the_weights_after_five_steps_are_those_of_one_process(cell: tuple[int, str], found: dict):
    """With uneven texts, a process without work in some steps, and fewer held-out texts than processes."""
    result = found[cell]
    assert result["difference"] < 1e-5
    assert max(result["losses"]) < 1e-5
    assert result["moved"] > 1e-3, "the comparison would pass if nothing was trained"


@pytest.mark.parametrize("cell", cells("sft", "reward", "ppo"))
def test_losses_and_norms_of_gradients_of_every_step_are_those_of_one_process(cell: tuple[int, str], found: dict):
    """AdamW does not see the scale of gradients, so the weights would not show a wrong one."""
    assert found[cell]["figures"] < 1e-4


@pytest.mark.parametrize("cell", cells("sft", "reward", "ppo", exact=False))
def test_no_process_keeps_a_whole_weight_after_a_pass_without_gradient(cell: tuple[int, str], found: dict):
    assert found[cell]["divided"]


def test_some_gradients_are_clipped_and_others_are_not(found: dict):
    norms = found[2, "sft-llama-none-clipped"]["norms"]
    assert min(norms) < 0.9 * CLIPPED
    assert max(norms) > 1.1 * CLIPPED


def test_in_bfloat16_the_losses_are_close_to_those_of_one_process(found: dict):
    result = found[2, "sft-llama-none-bfloat16"]
    assert max(result["losses"]) < 0.02
    assert result["learned"] > 0.2, "the losses would be close if nothing was trained"


@pytest.mark.parametrize("cell", [cell for cell in cells("sft") if cell.values[0][1].endswith("none")])
def test_each_process_holds_its_part_of_the_weights(cell: tuple[int, str], found: dict):
    share = 1 / cell[0]
    assert found[cell]["held"] == pytest.approx(share, abs=0.02)
    peak, largest = found[cell]["peak"]
    assert peak <= share + largest * (1 - share) + 0.02, "while it loads, more than its part and one part of the model"


@pytest.mark.parametrize("count", [2, 4])
def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(count: int, found: dict):
    assert found[count, "resume-llama-none"]["same"] == ["metrics.jsonl", "state.json", "tensors.safetensors"]


@pytest.mark.parametrize("count", [2, 4])
def test_a_run_goes_on_in_one_process_without_sharding(count: int, found: dict):
    assert found[count, "resume-llama-none"]["unsharded"] < 1e-5


def recipe(**more: dict) -> Recipe:
    plain = {"model": {"path": "base", "sharding": "fsdp"}, "sft": {"data": "data.jsonl"}}
    return Recipe.model_validate({name: plain.get(name, {}) | more.get(name, {}) for name in {**plain, **more}})


@pytest.mark.parametrize(
    ("more", "stage", "message", "remedy"),
    [
        ({"sft": {"optimizer": "adamw-8bit"}}, "sft", "does not support `sft.optimizer: adamw-8bit`", "change it"),
        (
            {"train_rm": {"data": "x.jsonl", "optimizer": "adamw-8bit"}},
            "train-rm",
            "`train_rm.optimizer: adamw-8bit`",
            "change it",
        ),
        (
            {"ppo": {"offload_frozen": True}},
            "ppo",
            "does not support `ppo.offload_frozen: True`",
            "--set ppo.offload_frozen=false --set model.sharding_cpu_offload=true",
        ),
    ],
)
def test_what_is_not_supported_is_refused_before_a_stage_runs(more: dict, stage: str, message: str, remedy: str):
    with pytest.raises(UsageError, match=message) as caught:
        check_sharding(recipe(**more), {stage})
    assert remedy in (caught.value.hint or "")
    assert "model.sharding=none" in (caught.value.hint or "")


def test_what_is_said_to_take_the_place_of_offload_frozen_is_accepted():
    check_sharding(recipe(model={"sharding_cpu_offload": True}, ppo={"offload_frozen": False}), {"ppo"})


def test_a_single_process_is_refused():
    with pytest.raises(UsageError, match="divides a model among several processes, but there is only one") as caught:
        require_processes(recipe())
    assert "--processes N" in (caught.value.hint or "")


@pytest.mark.parametrize("more", [{"quantize": "4bit"}, {"trust_remote_code": True, "revision": "abc"}])
def test_settings_that_contradict_sharding_are_refused(more: dict):
    with pytest.raises(ValueError, match="`sharding: fsdp` does not support"):
        recipe(model=more)
