"""What two processes with sharded models write is what one process writes of the same weights, byte for byte."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from tests.conftest import byte_level_tokenizer
from tests.families.zoo import save_tiny
from tests.preloaded import start

WRITTEN = (
    "llama-policy-none",
    "gpt2-policy-lora",
    "qwen3-policy-lora-bfloat16",
    "gemma3_text-policy-none-bfloat16",
    "llama-critic-none",
    "llama-critic-lora",
    "llama-reward-none",
    "llama-reward-lora",
    "qwen3_moe-policy-lora",
    "t5-policy-none",
)
ALONE = ("unseen", "differs")
"""Faults of reading back that process 1 alone has."""
CASES = (
    *WRITTEN,
    "all-scores",
    "llama-values",
    "llama-disk",
    "llama-kept",
    "llama-attention",
    "llama-probe",
    "llama-unread",
    *(f"llama-{kind}-{fault}" for kind in ("policy", "reward") for fault in ALONE),
)
"""The reward models that are scored with are those that were written before."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("written")
    for family in sorted({case.split("-")[0] for case in WRITTEN}):
        save_tiny(family, byte_level_tokenizer(chat=True), folder / family)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("sharded_saving.py")
    started = [start([folder, *CASES], program=script, env=environment(rank, port)) for rank in range(2)]
    for process in started:
        stdout, stderr = process.communicate(timeout=900)
        assert process.returncode == 0, stdout + stderr
    return {case: json.loads((folder / f"{case}.json").read_text()) for case in CASES}


def environment(rank: int, port: int) -> dict[str, str]:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    fixed = {"PYTHONPATH": Path(__file__).parents[2], "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": 1}
    own["RLHF_JOIN_SECONDS"] = 300  # other tests may take the processors
    return {**os.environ, **{name: str(value) for name, value in (own | fixed).items()}}


@pytest.mark.parametrize("case", WRITTEN)
def test_files_are_those_of_one_process(case: str, found: dict[str, dict]):
    """Configuration, tokenizer, names, types and values; merged adapters are rounded as one process rounds them."""
    assert found[case]["differing"] == []
    name = "adapter/adapter_model.safetensors" if "lora" in case else "model.safetensors"
    name = name.removeprefix("adapter/") if case == "llama-critic-lora" else name
    assert name in found[case]["names"]


@pytest.mark.parametrize("case", [case for case in WRITTEN if "policy" in case])
def test_the_written_policy_is_the_trained_one(case: str, found: dict[str, dict]):
    assert all(0 <= kl < 1e-9 for kl in found[case]["differences"])


@pytest.mark.parametrize("case", [case for case in WRITTEN if "reward" in case])
def test_the_written_reward_model_is_the_trained_one(case: str, found: dict[str, dict]):
    assert all(0 <= difference < 1e-5 for difference in found[case]["differences"])


@pytest.mark.parametrize("case", [case for case in WRITTEN if "critic" not in case])
def test_a_bar_counts_each_text_twice_and_the_writing(case: str, found: dict[str, dict]):
    label = "writing the reward model and comparing it" if "reward" in case else "writing the policy and comparing it"
    assert found[case]["bars"] == {label: [5, 5]}


@pytest.mark.parametrize("name", ["reward-none", "reward-lora"])
def test_a_reward_model_of_its_own_is_divided_and_scores_as_a_whole_one(name: str, found: dict[str, dict]):
    one = found["all-scores"][name]
    assert one["difference"] < 1e-5
    assert one["held"] == pytest.approx(0.5, abs=0.02)
    assert one["is_frozen"]


@pytest.mark.parametrize(
    ("case", "expected"),
    [("llama-values", "ModelError: the model written to"), ("llama-disk", "DiskError: cannot write the model")],
)
def test_a_fault_in_process_0_ends_all_processes_with_the_same_error(case: str, expected: str, found: dict[str, dict]):
    first, second = found[case]["told"]
    assert first == second
    assert first.startswith(expected)


@pytest.mark.parametrize("kind", ["policy", "reward"])
@pytest.mark.parametrize("fault", ALONE)
def test_a_fault_of_process_1_alone_ends_both_processes(kind: str, fault: str, found: dict[str, dict]):
    expected = "ModelError: this folder is not here" if fault == "unseen" else "ModelError: the model written to"
    for told in found[f"llama-{kind}-{fault}"]["told"]:
        assert len(told) == 2
        assert told[0] == told[1]
        assert told[0].startswith(expected)


def test_what_process_1_alone_cannot_read_ends_both_processes_with_its_message(found: dict[str, dict]):
    messages = ("No such file or directory", "a file was cut off")
    for message, told in zip(messages, found["llama-unread"]["told"], strict=True):
        assert told[0] == told[1]
        assert told[0].startswith("ModelError: cannot read the weight `model.layers.1.")
        assert message in told[0]


def test_models_are_compared_with_an_attention_that_computes_in_float32(found: dict[str, dict]):
    """Kernels of flash attention do not; here another one of transformers stands for them."""
    assert found["llama-attention"] == {"policy": ["eager"] * 2, "reward": ["eager"] * 2}


def test_all_processes_compare_on_what_process_0_drew(found: dict[str, dict]):
    assert found["llama-probe"]["drawn"] == [[[7, 0], [8, 0]]] * 2


def test_a_policy_can_be_written_while_it_trains_and_is_released_at_the_end(found: dict[str, dict]):
    assert found["llama-kept"]["same"]
    adapters = 100_000  # bytes; more than two ranks hold of A and B
    assert found["llama-kept"]["held"] < adapters
