"""Machines as a command line describes them, and sizes of models that are not at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cli.errors import UsageError
from rlhf_cli.models.gpus import GPUS, Cluster, find_gpu
from rlhf_cli.models.model_shape import ModelShape
from rlhf_cli.models.model_sizes import SIZES, find_size


@pytest.mark.parametrize(
    ("given", "name"),
    [("h100", "H100"), ("H100-PCIe", "H100 PCIe"), ("NVIDIA H200", "H200"), ("a100", "A100"),
     ("a100-40gb", "A100 40GB"), ("rtx-4090", "RTX 4090"), ("l4", "L4"), ("l40s", "L40S")],
)  # fmt: skip
def test_a_gpu_has_the_name_of_its_data_sheet(given, name):
    assert find_gpu(given) == (name, GPUS[name])


def test_a_machine_of_eight_is_the_default():
    cluster = Cluster.of("h100", 64)
    assert (cluster.nodes, cluster.memory, cluster.network) == (8, 80e9, 50e9)
    assert Cluster.of("h100", 4).nodes == 1
    assert str(Cluster.of("h100", 4)) == "4 x H100"
    assert str(Cluster.of("a100", 16, 2, 200)) == "16 x A100 on 2 nodes, 200 Gbit/s per GPU between"


def test_the_ring_is_as_fast_as_its_slowest_part():
    assert Cluster.of("h100", 8).bandwidth == 450e9, "NVLink"
    assert Cluster.of("h100", 16).bandwidth == 400e9, "eight networks of 50 GB/s"
    assert Cluster.of("h100", 16, gigabits=100).bandwidth == 100e9
    assert Cluster.of("h100", 2, nodes=2).bandwidth == 50e9, "one GPU in each node"
    assert Cluster.of("a100", 16).bandwidth == 300e9, "NVLink is slower than eight networks"


def test_a_gpu_that_is_not_listed_has_memory_alone():
    cluster = Cluster.of("48", 2)
    assert (cluster.memory, cluster.gpu) == (48e9, None)
    assert str(cluster) == "2 x GPU with 48 GB"


@pytest.mark.parametrize("given", ["h1000", "0", "-3", "nan", "inf", ""])
def test_what_is_no_gpu_is_refused(given):
    with pytest.raises(UsageError, match="unknown GPU") as caught:
        Cluster.of(given)
    assert "h100" in (caught.value.hint or "")


def test_gpus_are_equal_on_all_nodes():
    with pytest.raises(UsageError, match="10 GPUs cannot be divided among 4 nodes"):
        Cluster.of("h100", 10, 4)


@pytest.mark.parametrize(
    ("name", "billions"), [("1b", 1.236), ("8b", 8.030), ("32b", 32.762), ("70b", 70.554)], ids=lambda value: str(value)
)
def test_sizes_have_the_weights_that_their_model_cards_say(name, billions):
    assert SIZES[name].weights / 1e9 == pytest.approx(billions, rel=1e-3)


def test_a_configuration_gives_the_shape_that_its_weights_have(tiny_llama: Path):
    counted, read = find_size(str(tiny_llama / "config.json")), ModelShape.required(tiny_llama)
    assert (counted.weights, counted.embeddings, counted.layers) == (read.weights, read.embeddings, read.layers)
    assert (counted.queries, counted.keys, counted.vocabulary) == (read.queries, read.keys, read.vocabulary)
    config = json.loads((tiny_llama / "config.json").read_text())
    assert (counted.heads, counted.key_heads) == (config["num_attention_heads"], config["num_key_value_heads"])
    assert (read.heads, read.key_heads) == (counted.heads, counted.key_heads)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[]", "does not say how large"), ("{}", "does not say how large"),
     (json.dumps({"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 9,
                  "num_experts": 4}), "has experts")],
    ids=["broken", "list", "empty", "experts"],
)  # fmt: skip
def test_what_does_not_say_its_size_is_refused(content, message, tmp_path: Path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        find_size(str(tmp_path / "config.json"))
    with pytest.raises(UsageError, match="unknown size `9b`"):
        find_size("9b")
