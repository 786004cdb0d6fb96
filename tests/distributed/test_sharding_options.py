"""What sharded models can be combined with: each case over several processes equals one process."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_cli.errors import UsageError
from rlhf_cli.models.sharding import _compute_on
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages.sharding import check_groups, check_sharding, require_processes, sharding_size
from tests.conftest import byte_level_tokenizer
from tests.distributed.sharded_options import STEPS
from tests.distributed.test_sharding import environment
from tests.families.zoo import save_tiny
from tests.preloaded import start

SERVER = ("server-llama-lora", "server-llama-none")
SAVE = ("save-llama-lora", "save-llama-none")
CASES = (*SERVER, *SAVE, "head-llama-lora", "head-llama-none", "offload-llama-lora", "offload-llama-none")
HYBRID = ("hybrid-llama-lora", "hybrid-llama-none")


def run(folder: Path, cases: tuple[str, ...], processes: int, **variables: object) -> dict[str, dict]:
    """Run cases in several processes, which import the libraries once; returns what they wrote for each."""
    for family in sorted({case.split("-")[1] for case in cases}):
        save_tiny(family, byte_level_tokenizer(chat=True), folder / family)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("sharded_options.py")
    shared = {"MASTER_PORT": port, "WORLD_SIZE": processes, "RLHF_JOIN_SECONDS": 600, **variables}
    started = [
        start([folder, *cases], program=script, env=environment(processes, RANK=rank, LOCAL_RANK=rank, **shared))
        for rank in range(processes)
    ]
    for process in started:
        stdout, stderr = process.communicate(timeout=900)
        assert process.returncode == 0, stdout + stderr
    return {case: json.loads((folder / f"{case}.json").read_text()) for case in cases}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return run(tmp_path_factory.mktemp("options"), CASES, 2)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return run(tmp_path_factory.mktemp("hybrid"), HYBRID, 4)


@pytest.mark.parametrize("case", CASES)
def test_the_weights_after_some_steps_are_those_of_one_process(case: str, found: dict[str, dict]):
    assert found[case]["difference"] < 1e-5
    assert found[case]["score"] < 1e-5
    assert found[case]["moved"] > 1e-4, "the comparison would pass if nothing was trained"


@pytest.mark.parametrize("case", SERVER)
def test_a_server_gets_the_weights_before_each_rollout_also_after_it_was_lost(case: str, found: dict[str, dict]):
    """At the start, for both evaluations and in each step; no process ever gathers the whole policy."""
    assert found[case]["lost"]
    assert found[case]["updates"] == STEPS + 3
    assert found[case]["same_seeds"]
    assert found[case]["is_shared"], "the reward model is an adapter on the sharded backbone"


@pytest.mark.parametrize("case", SAVE)
def test_policies_of_save_steps_are_those_of_one_process(case: str, found: dict[str, dict]):
    assert found[case]["folders"] == [str(STEPS // 2)]
    assert found[case]["saved"] < 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("offload")])
def test_offloaded_models_name_the_device_on_which_they_compute(case: str, found: dict[str, dict]):
    assert found[case]["offloaded"]
    assert found[case]["devices"] == ["cpu", "cpu"]


@pytest.mark.parametrize("case", HYBRID)
def test_two_groups_of_two_processes_train_as_one_process(case: str, of_four: dict[str, dict]):
    """Gradients are summed over both dimensions, and their norm counts each once; a checkpoint is whole."""
    found = of_four[case]
    assert found["difference"] < 1e-5
    assert found["score"] < 1e-5
    assert found["moved"] > 1e-4
    assert found["held"] == pytest.approx(0.5, abs=0.02), "a group of two has a copy"
    assert found["checkpoint"] < 1e-5
    assert found["saved"] < 1e-5
    norm, off = found["norms"]
    assert norm > 1e-3, "it was clipped"
    assert off < 1e-4


def test_offloaded_models_name_another_device_than_that_of_their_weights():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    _compute_on(model, torch.device("meta"))
    assert model.device == model.model.device == torch.device("meta")
    assert model.lm_head.weight.device == torch.device("cpu")
    assert isinstance(model, LlamaForCausalLM)


def recipe(**model: object) -> Recipe:
    return Recipe.model_validate(
        {"model": {"path": "base", "sharding": "fsdp"} | model, "ppo": {"save_steps": 3, "critic": "head"}}
    )


def test_a_server_save_steps_and_a_critic_head_are_supported():
    served = recipe().model_copy(update={"generation": Recipe.model_validate(
        {"model": {"path": "base"}, "generation": {"engine": "vllm", "vllm_server": "http://localhost:8000"}}
    ).generation})  # fmt: skip
    check_sharding(served, {"ppo"})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"sharding": "none", "sharding_size": 2}, "`sharding_size` has no effect without `sharding: fsdp`"),
        ({"sharding": "none", "sharding_cpu_offload": True}, "`sharding_cpu_offload` has no effect without"),
        ({"sharding_cpu_offload": True, "device": "cpu"}, "`sharding_cpu_offload` has no effect with `device: cpu`"),
        ({"sharding_size": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_without_effect_are_refused_in_the_recipe(model: dict, message: str):
    with pytest.raises(ValueError, match=message):
        recipe(**model)


@pytest.mark.parametrize(
    ("size", "count", "of_machine", "message"),
    [
        (3, 8, 4, "makes groups of 3 processes, and 8 processes cannot be divided"),
        (16, 8, 4, "makes groups of 16 processes"),
        ("machine", 8, 3, "`model.sharding_size: machine` makes groups of 3 processes"),
        ("machine", 2, 1, "divides a model among the processes of a machine, and each has one"),
    ],
)
def test_groups_that_do_not_fit_are_refused(size: object, count: int, of_machine: int, message: str):
    with pytest.raises(UsageError, match=message):
        check_groups(recipe(sharding_size=size).model, count, of_machine)
    check_groups(recipe(sharding_size=2).model, 8, 4)


def test_the_group_of_a_machine_are_the_processes_that_the_launcher_counts(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert sharding_size(recipe(sharding_size="machine").model) == 4
    assert sharding_size(recipe(sharding_size=2).model) == 2
    assert sharding_size(recipe().model) is None


def test_offloading_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"`model\.sharding_cpu_offload` has no effect on the device `cpu`") as caught:
        require_processes(recipe(sharding_cpu_offload=True))
    assert "model.sharding_cpu_offload=false" in (caught.value.hint or "")
