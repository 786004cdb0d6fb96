"""Sizes and sums of the memory estimate; tests/gpu/test_memory.py compares it with the bytes that stages hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.memory_estimate import MemoryNeed, ModelShape, frozen_bytes, number_bytes, training_need
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.stages.ppo.models import SharedBackbone


def test_sizes_are_read_from_configuration_and_headers(tiny_llama: Path):
    with safe_open(tiny_llama / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        vocabulary = file.get_slice("model.embed_tokens.weight").get_shape()[0]
    shape = ModelShape.of(tiny_llama)
    assert shape is not None
    assert (shape.layers, shape.hidden, shape.feed_forward, shape.queries, shape.keys) == (2, 32, 64, 32, 16)
    assert shape.vocabulary == vocabulary
    assert shape.embeddings == sum(size[0] * size[1] for size in shapes if size[0] == vocabulary)
    assert shape.weights == sum(size[0] * (size[1] if len(size) > 1 else 1) for size in shapes)


def test_a_folder_that_says_no_sizes_has_no_estimate(tmp_path: Path):
    assert ModelShape.of(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert ModelShape.of(tmp_path) is None


def test_an_adapter_has_as_many_weights_as_are_trained(tiny_llama: Path):
    shape = ModelShape.of(tiny_llama)
    assert shape is not None
    models = SharedBackbone(load_policy(ModelSource(str(tiny_llama))), LoraSettings(rank=4, alpha=8.0))
    assert shape.adapter(4) == sum(parameter.numel() for parameter in models.policy_parameters())


def test_sums_by_hand():
    """10 weights are trained: 40 bytes, their gradients 40, two moments 80; 100 are frozen in bfloat16: 200 bytes."""
    need = training_need(trained=10, frozen=100, frozen_bytes=2, activations=7, decoding=50)
    assert need == MemoryNeed(weights=240, gradients=40, optimizer=80, activations=7, decoding=50)
    assert need.total == 240 + 80 + 50, "gradients and activations are gone while tokens are drawn"
    small = training_need(trained=1034, frozen=0, frozen_bytes=2, activations=0, optimizer="adamw-8bit", embeddings=10)
    assert small.optimizer == 2 * (10 * 4 + 1024 * 1 + 1024 // 256 * 4), "a byte per number and a scale per 256"
    shape = ModelShape(weights=1, layers=2, hidden=8, feed_forward=16, queries=8, keys=4, vocabulary=100)
    assert shape.cache(rows=3, tokens=5, number_bytes=2) == 2 * 3 * 5 * 4 * 2 * 3
    assert shape.activations(10, 2, recompute=True) < shape.activations(10, 2) < shape.activations(10, 4)
    assert shape.logits(10) == 3 * 4 * 10 * 100


@pytest.mark.parametrize(
    ("settings", "expected"),
    [(("auto", "float32", "none"), 4), (("auto", "auto", "none"), 2), (("bfloat16", "bfloat16", "none"), 2),
     (("auto", "bfloat16", "8bit"), 1), (("float32", "bfloat16", "none"), 4)],
)  # fmt: skip
def test_bytes_of_a_frozen_weight(settings, expected):
    assert frozen_bytes(*settings) == expected
    assert number_bytes("float32") == 4


def test_a_dry_run_says_what_a_stage_needs(tiny_llama: Path, tmp_path: Path, rlhf_here):
    rows = [{"prompt": f"Why {number}?", "completion": " Because."} for number in range(9)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("sft", "--model", tiny_llama, "--data", "data.jsonl", "--dry-run")
    needs = []
    for adapter in ("lora", "none"):
        code, said = rlhf_here(*command, "--set", f"sft.adapter={adapter}", "--set", "model.precision=float32")
        assert code == 0
        assert "would run" in said
        needs.append(said.partition("needs up to about ")[2])
    assert all("on a GPU" in need for need in needs)
    assert needs[0] != needs[1]
