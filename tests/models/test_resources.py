"""Formulas of memory and operations by hand; docs/performance.md and tests/gpu/test_memory.py have what stages held."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rlhf_cli.attention import slot_cache
from rlhf_cli.generation.logprobs import completion_hidden
from rlhf_cli.generation.sequence_batch import SequenceBatch
from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.model_shape import CACHE_BLOCK, ModelShape
from rlhf_cli.models.resources import Extent, MemoryNeed, frozen_bytes, memory_need, moments, number_bytes
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.shared import LoraSettings
from rlhf_cli.stages import registry
from rlhf_cli.stages.ppo.models import SharedBackbone

SHAPE = ModelShape(
    weights=1_900, layers=2, hidden=8, feed_forward=16, queries=8, keys=4, vocabulary=100, embeddings=800, stored=3_800
)
"""A model with tied embeddings of 100 x 8."""


def test_the_cache_is_counted_in_the_blocks_by_which_it_grows():
    assert CACHE_BLOCK == slot_cache.BLOCK


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
    assert shape.stored == (tiny_llama / "model.safetensors").stat().st_size


def test_a_folder_that_says_no_sizes_has_no_estimate(tmp_path: Path):
    assert ModelShape.of(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert ModelShape.of(tmp_path) is None


def test_an_adapter_has_as_many_weights_as_are_trained(tiny_llama: Path):
    shape = ModelShape.of(tiny_llama)
    assert shape is not None
    models = SharedBackbone(load_policy(ModelSource(str(tiny_llama))), LoraSettings(rank=4, alpha=8.0))
    assert shape.adapter(4) == sum(parameter.numel() for parameter in models.policy_parameters())


def test_operations_by_hand():
    """Backbone: 1,900 - 800 = 1,100 weights; attention: 2 layers of width 8, 4 x 2 x 8 = 64 per pair."""
    assert SHAPE.backbone == 1_100
    assert SHAPE.forward_flops(10) == 2 * 1_100 * 10
    assert SHAPE.forward_flops(10, scored=3, pairs=100) == 2 * 1_100 * 10 + 2 * 100 * 8 * 3 + 64 * 100
    assert SHAPE.training_flops(10, scored=3, pairs=100) == 3 * SHAPE.forward_flops(10, scored=3, pairs=100)
    per_rank = 2 * ((8 + 8) + 2 * (8 + 4) + (8 + 8) + 3 * (8 + 16))
    assert SHAPE.adapter(2) == 2 * per_rank
    by_hand = 4 * 1_100 * 10 + 4 * 100 * 8 * 3 + 6 * 2 * per_rank * 10 + 192 * 100
    assert SHAPE.training_flops(10, scored=3, pairs=100, rank=2) == by_hand


@pytest.mark.parametrize("rank", [None, 4])
def test_activations_are_the_bytes_that_a_pass_on_a_cpu_saves(rank, tiny_llama: Path):
    model = load_policy(ModelSource(str(tiny_llama)))
    if rank is not None:
        add_lora(model, LoraSettings(rank=rank))
    for name, weight in model.named_parameters():
        weight.requires_grad_(rank is None or "lora_" in name)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (at := tensor.untyped_storage().data_ptr()) not in weights:
            kept[at] = tensor  # held, so that no other tensor gets its address
        return tensor

    batch = SequenceBatch.for_model(model, [[5] * 40, [6] * 30], [[7] * 80, [8] * 90])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = completion_hidden(model, batch)
    assert hidden.requires_grad
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    shape = ModelShape.required(tiny_llama)
    assert batch.input_ids.numel() == 240
    outside = 240 * 4 * ((2 if rank is None else 1) * 32 + 2 * 8)  # of layers: the last norm, sines and cosines
    assert shape.activations(240, 4, rank=rank, on_cpu=True) + outside == pytest.approx(saved, rel=0.02)


def test_bytes_by_hand():
    assert moments(1_000) == 2 * 1_000 * 4
    by_hand = 2 * (10 * 4 + 1_024 * 1 + 1_024 // 256 * 4)
    assert moments(1_034, "adamw-8bit", embeddings=10) == by_hand, "a byte per number and a scale per 256"
    assert SHAPE.activations(10, 2, recompute=True) < SHAPE.activations(10, 2) < SHAPE.activations(10, 4)
    assert SHAPE.logits(10) == 3 * 4 * 10 * 100
    assert SHAPE.cache(3, 130, 2) == 2 * 3 * 256 * 4 * 2 * (2 + 1), "two blocks, two layers and a copy of one"


def test_what_a_process_gathers_by_hand():
    """A block has (1,900 - 800) / 2 = 550 weights; 800 are outside; an adapter of rank 2 has as many per layer."""
    adapter = SHAPE.adapter(2) / 2
    assert SHAPE.gathered(2) == (2 * 550 + 800) * 2
    assert SHAPE.gathered(2, trains=True) == SHAPE.gathered(2) + (550 + 800) * (2 + 4)
    assert SHAPE.gathered(2, rank=2, adapters=2) == SHAPE.gathered(2) + 2 * 2 * adapter * 4
    trained = SHAPE.gathered(2, rank=2, adapters=2, trains=True)
    assert trained == SHAPE.gathered(2, rank=2, adapters=2) + 2 * adapter * 4, "of one adapter at a time"


def test_the_most_at_any_one_time():
    phases = {"load": {"policy": 40, "file": 20}, "update": {"policy": 40, "gradients": 40}, "save": {"policy": 70}}
    assert MemoryNeed(phases).total == 80
    assert MemoryNeed(phases).peak_phase == "update"
    on_cpu = memory_need(Extent(SHAPE, on_cpu=True, process=100), phases)
    assert on_cpu.total == 180
    assert memory_need(Extent(SHAPE), phases).total == 80, "the process is not on a GPU"
    loop = {"passes": {"policy": 40, "reference": 30}, "update": {"policy": 40, "gradients": 40}}
    assert MemoryNeed(loop, frozenset({"reference"})).total == 80 + 30, "pages come on top of what glibc keeps"
    loop["passes"] |= {"reward model": 20}
    assert MemoryNeed(loop, frozenset({"reference", "reward model"})).total == 80 + 30, (
        "one rests while the other is used"
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [(("auto", "float32", "none"), 4), (("auto", "auto", "none"), 2), (("bfloat16", "bfloat16", "none"), 2),
     (("auto", "bfloat16", "8bit"), 1), (("float32", "bfloat16", "none"), 4)],
)  # fmt: skip
def test_bytes_of_a_frozen_weight(settings, expected):
    assert frozen_bytes(*settings) == expected
    assert number_bytes("float32") == 4


SECTIONS = {
    "sft": {"data": "d.jsonl", "adapter": "none"},
    "train-rm": {"data": "d.jsonl", "adapter": "none"},
    "ppo": {"adapter": "none", "steps": 1, "rewards": [{"function": "f.py:score"}]},
}


def need(stage: str, extent: Extent = Extent(SHAPE), **changes: object) -> MemoryNeed:  # noqa: B008  (frozen)
    section = stage.replace("-", "_")
    plain = {"model": {"path": "m", "precision": "float32"}, "data": {"prompts": "p.jsonl"}}
    recipe = Recipe.model_validate(plain | {section: SECTIONS[stage] | changes})
    found = registry.stage(stage).memory(recipe.section(stage), recipe, extent)
    assert found is not None
    return found


@pytest.mark.parametrize("stage", SECTIONS)
def test_what_a_setting_changes(stage):
    update = need(stage).phases["update"]
    doubled = need(stage, micro_batch_size=8).phases["update"]
    half = need(stage, micro_batch_size=4).phases["update"]
    assert doubled["activations"] == 2 * half["activations"]
    assert doubled["gradients"] == half["gradients"] == update["gradients"]
    assert update["optimizer"] == 2 * update["gradients"]
    assert need(stage, optimizer="adamw-8bit").phases["update"]["optimizer"] < update["optimizer"]
    assert need(stage, gradient_checkpointing=True).phases["update"]["activations"] < update["activations"]
    assert need(stage, adapter="lora", lora={"rank": 1}).phases["update"]["gradients"] < update["gradients"]


def test_a_model_that_only_scores_is_not_there_in_an_update_where_it_can_rest():
    on_cpu, on_gpu = Extent(SHAPE, reward=SHAPE, on_cpu=True), Extent(SHAPE, reward=SHAPE)
    assert need("ppo", on_gpu).phases["update"].keys() >= {"reference", "reward model"}
    resting = need("ppo", on_cpu)
    assert not resting.phases["update"].keys() & {"reference", "reward model"}
    assert resting.phases["passes"].keys() >= {"reference", "reward model"}
    assert need("ppo", on_gpu, offload_frozen=True).total < need("ppo", on_gpu).total


def test_lengths_that_were_read_take_the_place_of_those_that_are_allowed():
    few = dataclasses.replace(Extent(SHAPE), tokens=10)
    assert need("sft", few).phases["update"]["activations"] == SHAPE.activations(10, 4)
    assert need("sft", few).total < need("sft").total


@pytest.mark.parametrize(("records", "processes", "rows"), [(None, 1, 32), (None, 4, 16), (14, 1, 14), (14, 4, 4)])
def test_a_reward_model_is_normalized_over_a_completion_of_64_rankings(records: int | None, processes: int, rows: int):
    """At most 32 are drawn at a time; the processes divide them, and each holds the SFT model whole."""
    extent = Extent(SHAPE, prompt=10, records=records, processes=processes)
    drawing, of_one = (
        need("train-rm", one).phases["rollout"] for one in (extent, dataclasses.replace(extent, records=1))
    )
    assert drawing["cache"] == rows * of_one["cache"]
    assert drawing["SFT model"] == 4 * SHAPE.weights


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
