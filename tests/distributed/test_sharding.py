"""`model.sharding: fsdp` over two processes equals one process; what it does not support is refused by name."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.sharding import check_sharding, require_processes
from tests.conftest import byte_level_tokenizer
from tests.families.zoo import save_tiny
from tests.preloaded import start

CASES = (
    "sft-llama-none",
    "sft-qwen3-lora",
    "sft-gemma3_text-none",
    "resume-llama-none",
    "reward-llama-lora",
    "reward-qwen3-none",
    "ppo-llama-none",
    "ppo-qwen3-lora",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What two processes, which import the libraries once for all cases, wrote for each case."""
    folder = tmp_path_factory.mktemp("sharded")
    for family in sorted({case.split("-")[1] for case in CASES}):
        save_tiny(family, byte_level_tokenizer(chat=True), folder / family)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("sharded.py")
    started = [
        start([folder, *CASES], program=script, env=environment(RANK=rank, LOCAL_RANK=rank, MASTER_PORT=port))
        for rank in range(2)
    ]
    for process in started:
        stdout, stderr = process.communicate(timeout=900)
        assert process.returncode == 0, stdout + stderr
    return {case: json.loads((folder / f"{case}.json").read_text()) for case in CASES}


def environment(**more: object) -> dict[str, str]:
    import os

    fixed = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **fixed, **{k: str(v) for k, v in more.items()}}


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("resume")])
def test_the_weights_after_five_steps_are_those_of_one_process(case: str, found: dict[str, dict]):
    """With uneven texts, a process without work in some steps, and fewer held-out texts than processes."""
    assert found[case]["difference"] < 1e-5
    assert max(found[case]["losses"]) < 1e-5
    assert found[case]["moved"] > 1e-3, "the comparison would pass if nothing was trained"


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("sft") and case.endswith("none")])
def test_each_process_holds_half_of_the_weights(case: str, found: dict[str, dict]):
    assert found[case]["held"] == pytest.approx(0.5, abs=0.02)
    peak, largest = found[case]["peak"]
    assert peak <= 0.5 + largest / 2 + 0.02, "while it loads, more than its part and one part of the model"


def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(found: dict[str, dict]):
    assert found["resume-llama-none"]["same"] == ["metrics.jsonl", "state.json", "tensors.safetensors"]


def test_a_run_goes_on_in_one_process_without_sharding(found: dict[str, dict]):
    assert found["resume-llama-none"]["unsharded"] < 1e-5


def recipe(**more: dict) -> Recipe:
    plain = {"model": {"path": "base", "sharding": "fsdp"}, "sft": {"data": "data.jsonl"}}
    return Recipe.model_validate({name: plain.get(name, {}) | more.get(name, {}) for name in {**plain, **more}})


@pytest.mark.parametrize(
    ("more", "stage", "message"),
    [
        ({"sft": {"optimizer": "adamw-8bit"}}, "sft", "does not support `sft.optimizer: adamw-8bit`"),
        ({"train_rm": {"data": "x.jsonl", "optimizer": "adamw-8bit"}}, "train-rm", "`train_rm.optimizer: adamw-8bit`"),
        ({"ppo": {"critic": "head"}}, "ppo", "does not support `ppo.critic: head`"),
        ({"ppo": {"adapter": "none"}}, "ppo", "set `ppo.critic_from: policy`"),
        ({"ppo": {"save_steps": 3}}, "ppo", "does not support `ppo.save_steps: 3`"),
        ({"ppo": {"offload_frozen": True}}, "ppo", "does not support `ppo.offload_frozen: True`"),
        ({"ppo": {}, "generation": {"engine": "vllm"}}, "ppo", "does not support `generation.engine: vllm`"),
    ],
)
def test_what_is_not_supported_is_refused_before_a_stage_runs(more: dict, stage: str, message: str):
    with pytest.raises(UsageError, match=message) as caught:
        check_sharding(recipe(**more), {stage})
    assert "model.sharding=none" in (caught.value.hint or "")


def test_a_single_process_is_refused():
    with pytest.raises(UsageError, match="divides a model among several processes, but there is only one") as caught:
        require_processes(recipe())
    assert "--processes N" in (caught.value.hint or "")


@pytest.mark.parametrize("more", [{"quantize": "4bit"}, {"trust_remote_code": True, "revision": "abc"}])
def test_settings_that_contradict_sharding_are_refused(more: dict):
    with pytest.raises(ValueError, match="`sharding: fsdp` does not support"):
        recipe(model=more)
