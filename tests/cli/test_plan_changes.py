"""What `rlhf plan` says to change if a stage does not fit: what makes it fit, and that nothing does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_cli.models.model_sizes import SIZES
from rlhf_cli.models.resources import Extent, vllm_least
from rlhf_cli.pipeline.plan_advice import Advice, accepted_by, advise
from rlhf_cli.pipeline.prediction import SERVER_SHARE
from rlhf_cli.recipe.overrides import Layers, parse_set
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.stages import registry

GPU = 80_000_000_000
PROMPT, COMPLETION = 512, 1_024


def recipe_of(*changes: str, **sections: Any) -> Recipe:
    """Return a recipe of all stages, after changes as `--set` takes them."""
    plain = {
        "model": {"path": "m", "precision": "bfloat16"},
        "generation": {"engine": "torch"},
        "sampling": {"max_new_tokens": COMPLETION},
        "sft": {"data": "d"},
        "label": {"by": "function", "function": "f.py:f"},
        "train_rm": {},
        "ppo": {
            "prompts_per_step": 512,
            "critic_from": "policy",
            "micro_batch_size": 4,
            "gradient_checkpointing": True,
        },
        "evaluate": {},
    }
    layers = Layers(plain | sections)
    for change in changes:
        layers.add(parse_set(change))
    return Recipe.model_validate(layers.data)


def extent_of(size: str, count: int, gpu: int = GPU) -> Extent:
    return Extent(SIZES[size], prompt=PROMPT, processes=count, machine=min(count, 8), device=gpu)


def total(stage: str, recipe: Recipe, extent: Extent) -> int:
    need = registry.stage(stage).memory(recipe.section(stage), recipe, extent)
    assert need is not None
    return need.total


def advised(stage: str, recipe: Recipe, extent: Extent) -> tuple[list[Advice], list[Advice]]:
    accepts = accepted_by(recipe, {stage})
    return advise(registry.stage(stage), recipe.section(stage), recipe, extent, extent.device, accepts)


@pytest.mark.parametrize("stage", ["sft", "label", "train-rm", "ppo", "evaluate"])
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("size", ["8b", "32b", "70b"])
@pytest.mark.parametrize("given", [(), ("ppo.adapter=none", "sft.adapter=none"), ("model.sharding=fsdp",)], ids=str)
def test_what_is_said_to_fit_fits_as_the_recipe_then_is(stage, count, size, given):
    recipe, extent = recipe_of(*given), extent_of(size, count)
    if total(stage, recipe, extent) <= GPU:
        return
    advice, combined = advised(stage, recipe, extent)
    for one in advice:
        assert one.total == total(stage, recipe_of(*given, one.change), extent)
        assert one.fits is (one.total <= GPU)
    changes = [one.change for one in combined]
    for number, one in enumerate(combined, 1):
        assert one.total == total(stage, recipe_of(*given, *changes[:number]), extent)
        assert one.fits is (number == len(changes)), "no fewer of them suffice"
    assert not (combined and any(one.fits for one in advice)), "one that suffices needs no others"


def drawing(advice: list[Advice]) -> list[Advice]:
    return [one for one in advice if one.change.startswith("generation=")]


def test_a_policy_that_is_too_large_to_be_drawn_from_is_divided_or_has_a_server():
    recipe, extent = recipe_of("model.sharding=fsdp"), extent_of("70b", 8)
    advice, combined = advised("ppo", recipe, extent)
    assert not combined
    engine, server = drawing(advice)
    changed = recipe_of("model.sharding=fsdp", engine.change).generation
    least = vllm_least(SIZES["70b"], PROMPT + COMPLETION)
    assert changed.engine == "vllm"
    assert least / changed.tensor_parallel_size <= changed.gpu_memory_utilization * GPU, "vLLM starts with that share"
    assert 8 % changed.tensor_parallel_size == 0
    assert server.change == "generation={vllm_server: http://HOST:8000}"
    assert server.server_gpus == 2
    assert SERVER_SHARE * GPU < least < 2 * SERVER_SHARE * GPU
    assert engine.keeps_result
    assert server.keeps_result


@pytest.mark.parametrize(
    ("given", "size", "gpu", "why"),
    [
        (("ppo.adapter=none",), "70b", GPU, "the update is too large"),
        (("generation={vllm_server: http://host:1}", "ppo.adapter=none"), "70b", GPU, "it has a server"),
        ((), "70b", 10_000_000_000, "eight GPUs do not hold the model"),
    ],
)
def test_other_ways_to_draw_are_not_named_if_the_stage_does_not_fit_with_them(given, size, gpu, why):
    advice, _ = advised("ppo", recipe_of("model.sharding=fsdp", *given), extent_of(size, 8, gpu))
    assert not drawing(advice), why


@pytest.mark.parametrize(
    ("sharding", "names"),
    [("none", ["model.quantize", "ppo.adapter"]), ("fsdp", ["generation", "model.sharding_cpu_offload"])],
)
def test_the_fewest_changes_that_suffice_together_are_named(sharding, names):
    given = (f"model.sharding={sharding}", "ppo.adapter=none")
    advice, combined = advised("ppo", recipe_of(*given), extent_of("70b", 8))
    assert not any(one.fits for one in advice)
    assert sorted(one.change.partition("=")[0] for one in combined) == names


@pytest.mark.parametrize(("key_heads", "sizes"), [(8, [4, 4]), (10, [])])
def test_a_model_is_divided_only_among_gpus_that_vllm_divides_it_among(key_heads, sizes):
    """Two GPUs of 64 GB are too small for a model of 70B, and vLLM does not divide 10 key heads among four or eight."""
    given = recipe_of("model.sharding=fsdp")
    extent = extent_of("70b", 8, 64_000_000_000)
    extent = replace(extent, shape=replace(extent.shape, key_heads=key_heads))
    advice = drawing(advised("label", given, extent)[0])
    changed = [recipe_of("model.sharding=fsdp", one.change).generation for one in advice]
    assert [one.server_gpus or new.tensor_parallel_size for one, new in zip(advice, changed, strict=True)] == sizes


@pytest.mark.parametrize("stage", ["label", "evaluate"])
def test_a_stage_that_does_not_train_has_the_same_ways_to_draw(stage):
    advice, _ = advised(stage, recipe_of("model.sharding=fsdp"), extent_of("70b", 8))
    assert [(one.fits, one.server_gpus) for one in drawing(advice)] == [(True, 0), (True, 2)]
    advice, combined = advised(stage, recipe_of(), extent_of("70b", 8))
    assert not drawing(advice), "each process holds the policy whole, whoever draws"
    assert [one.change.partition("=")[0] for one in combined] == ["model.sharding", "generation"]


@pytest.mark.parametrize("generation", ["{engine: vllm}", "{vllm_server: 'http://host:1'}"])
def test_quantization_is_not_named_where_vllm_draws(generation):
    with pytest.raises(ValidationError, match=r"cannot hand the weights of a policy with .* to vLLM"):
        recipe_of(f"generation={generation}", "model.quantize=8bit")
    advice, combined = advised("ppo", recipe_of(f"generation={generation}"), extent_of("70b", 1))
    assert not [one for one in (*advice, *combined) if "quantize" in one.change]
    advice, _ = advised("ppo", recipe_of(), extent_of("70b", 1))
    assert [one.fits for one in advice if "quantize" in one.change] == [True]


@pytest.mark.parametrize("stage", ["label", "evaluate"])
@pytest.mark.parametrize("generation", ["{engine: torch}", "{engine: vllm}", "{vllm_server: 'http://host:1'}"])
def test_nothing_suffices_on_one_gpu_for_a_model_that_is_larger(stage, generation):
    recipe = recipe_of(f"generation={generation}")
    advice, combined = advised(stage, recipe, extent_of("70b", 1))
    assert not combined
    assert not any(one.fits for one in advice)


def test_a_stage_that_a_server_draws_for_holds_its_model_and_no_keys():
    recipe = recipe_of("generation={vllm_server: http://host:1}")
    need = registry.stage("label").memory(recipe.section("label"), recipe, extent_of("8b", 1))
    assert need is not None
    assert need.phases["rollout"] == {"policy": 2 * SIZES["8b"].weights, "sent": 2**29}
