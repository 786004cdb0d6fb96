"""Predicted seconds and bytes by hand: a small shape on GPUs with round numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlhf_cli.models.gpus import GPU, Cluster
from rlhf_cli.models.model_shape import ModelShape
from rlhf_cli.models.resources import Extent, vllm_share
from rlhf_cli.pipeline.plan_target import Target
from rlhf_cli.pipeline.prediction import COMPUTE, MEMORY, NETWORK, SERVER_SHARE, Predictor, Server, Took
from rlhf_cli.recipe.schema import Recipe
from rlhf_cli.settings.run import RunSettings
from rlhf_cli.settings.shared import GenerationSettings, StageSamplingSettings
from rlhf_cli.stages.base import sampling_memory
from rlhf_cli.stages.ppo.memory import ppo_memory
from rlhf_cli.stages.training_memory import host_copy
from rlhf_cli.stages.workload import Work, Workload, drawing

SHAPE = ModelShape(
    weights=1_900, layers=2, hidden=8, feed_forward=16, queries=8, keys=4, vocabulary=100, embeddings=800, stored=3_800
)
PEAK, BANDWIDTH, LINK = 1e6, 1e5, 1e4
"""Operations, bytes and bytes per second."""
KV = 2 * 2 * 4 * 2
"""Bytes of the keys and values of a token: 2 x layers x width x 2."""


def cluster(count: int = 1, nodes: int = 1, network: float = 1e3) -> Cluster:
    gpu = GPU(PEAK, PEAK / 2, PEAK / 4, 80, BANDWIDTH / 1e9, LINK / 1e9)
    return Cluster("made up", 80e9, gpu, count, nodes, network)


def recipe(
    sharding: str = "none", engine: str = "torch", share: float = 0.5, sharding_size: int | None = None, **ppo: Any
) -> RunSettings:
    return Recipe.model_validate(
        {
            "model": {"path": "m", "precision": "bfloat16", "sharding": sharding, "sharding_size": sharding_size},
            "data": {"prompts": "p.jsonl"},
            "generation": {"engine": engine, **({"gpu_memory_utilization": share} if engine == "vllm" else {})},
            "ppo": {"rewards": [{"function": "f.py:score"}], "steps": 1, **ppo},
        }
    )


def predictor(count: int = 1, sharding: str = "none", engine: str = "torch", **changes: Any) -> Predictor:
    extent = Extent(SHAPE, processes=count)
    return replace(Predictor(cluster(count), recipe(sharding, engine), extent), **changes)


def ring(size: float, count: int, bandwidth: float = LINK) -> float:
    return size * (count - 1) / count / (bandwidth * NETWORK)


TRAIN = Work("update", "train", 100.0, 3e6, calls=2, rows=4, each=16, shape=SHAPE, trained=1_900)
FORWARD = Work("passes", "forward", 100.0, 1e6, calls=2, rows=4, each=16, shape=SHAPE)


def test_a_forward_pass_is_its_operations():
    assert predictor().took(FORWARD) == Took(1e6 / (PEAK * COMPUTE), 1e6 / (PEAK * COMPUTE), 0.0, 0.0)
    quarter = predictor(4).took(FORWARD)
    assert quarter.total == pytest.approx(1e6 / 4 / (PEAK * COMPUTE))
    uneven = predictor(5).took(FORWARD)
    assert uneven.total == pytest.approx(1e6 * 4 / 16 / (PEAK * COMPUTE)), "one of five processes has four of sixteen"


def test_whole_models_sum_their_gradients_once_per_optimizer_step():
    took = predictor(4).took(TRAIN)
    assert took.compute == pytest.approx(3e6 / 4 / (PEAK * COMPUTE))
    assert took.memory == pytest.approx(2 * 28 * 1_900 / (BANDWIDTH * MEMORY))
    assert took.network == pytest.approx(ring(2 * 2 * 4 * 1_900, 4))
    assert took.total == pytest.approx(took.compute + took.memory + took.network)


def test_sharded_models_gather_weights_in_each_pass_and_overlap_it():
    took = predictor(2, "fsdp").took(TRAIN)
    passes = 2 * 2  # two steps of 8 sequences on each process, four at a time
    assert took.network == pytest.approx(ring(passes * (2 * 2 * 1_900 + 4 * 1_900), 2))
    assert took.memory == pytest.approx(2 * 28 * 1_900 / 2 / (BANDWIDTH * MEMORY))
    assert took.total == pytest.approx(max(took.compute, took.network) + took.memory)
    forward = predictor(2, "fsdp").took(FORWARD)
    assert forward.network == pytest.approx(ring(passes * 2 * 1_900, 2))
    assert forward.total == pytest.approx(max(forward.compute, forward.network))


def test_nodes_are_slower_than_their_links():
    near = predictor(4, "fsdp").took(TRAIN).network
    far = predictor(4, "fsdp", cluster=cluster(4, nodes=2)).took(TRAIN).network
    assert far == pytest.approx(near * LINK / 2e3), "two networks of 1e3 bytes per second"


@pytest.mark.parametrize(("is_full", "more"), [(True, 4 / 3), (False, 3 / 2)])
def test_activations_that_are_computed_again_take_a_forward_pass_more(is_full, more):
    once = predictor().took(TRAIN).compute
    assert predictor(recompute=True, is_full=is_full).took(TRAIN).compute == pytest.approx(more * once)
    assert predictor(recompute=True).took(FORWARD) == predictor().took(FORWARD)


def test_tokens_are_drawn_as_fast_as_weights_and_keys_are_read():
    drawn = drawing(SHAPE, "rollout", [10, 10], per_prompt=1, mean=5.0, longest=5, rows=2)
    took = predictor().took(drawn)
    keys = 2 * 5 * (10 + 2.5)
    assert drawn.keys == keys
    assert took.memory == pytest.approx((5 * 2 * 1_900 + keys * KV) / (BANDWIDTH * MEMORY))
    prefill = SHAPE.forward_flops(20, scored=2, pairs=200)
    decode = SHAPE.forward_flops(10, scored=8, pairs=keys)  # the logits of the first tokens come with the prompts
    assert took.compute == pytest.approx((prefill + decode) / (PEAK * COMPUTE))
    longer = max(took.memory, decode / (PEAK * COMPUTE))
    assert took.total == pytest.approx(prefill / (PEAK * COMPUTE) + longer)
    one_by_one = predictor().took(replace(drawn, rows=1))
    assert one_by_one.memory == pytest.approx((10 * 2 * 1_900 + keys * KV) / (BANDWIDTH * MEMORY))


def test_a_sharded_policy_is_gathered_once_to_draw():
    drawn = drawing(SHAPE, "rollout", [10] * 4, per_prompt=1, mean=5.0, longest=5, rows=4, calls=2)
    assert predictor(2, "fsdp").took(drawn).network == pytest.approx(ring(2 * 2 * 1_900, 2))
    assert predictor(2).took(drawn).network == 0.0


def test_groups_gather_within_a_machine_and_sum_gradients_between():
    hybrid = recipe("fsdp", sharding_size=2)
    found = predictor(4, recipe=hybrid, cluster=cluster(4, nodes=2)).took(TRAIN)
    passes = 2 * 1  # two steps of 4 sequences on each process, four at a time
    gathered = ring(passes * (2 * 2 * 1_900 + 4 * 1_900), 2)
    summed = passes * 2 * (4 * 1_900 / 2) / 2 / (1e3 * NETWORK)
    assert found.network == pytest.approx(gathered + summed)
    assert found.memory == pytest.approx(2 * 28 * 1_900 / 2 / (BANDWIDTH * MEMORY)), "two processes have a copy"
    assert predictor(4, recipe=hybrid, cluster=cluster(4, nodes=2)).took(FORWARD).network == pytest.approx(
        ring(passes * 2 * 1_900, 2)
    )


def server(count: int, engine_gpus: int) -> Server:
    return Server(cluster(count), engine_gpus)


def test_a_server_draws_on_its_own_gpus():
    drawn = drawing(SHAPE, "rollout", [10] * 8, per_prompt=1, mean=5.0, longest=5, rows=2)
    alone = predictor(engine="vllm").took(drawn)
    took = predictor(2, server=server(1, 1)).took(drawn)
    assert (took.compute, took.memory) == (alone.compute, alone.memory), "on one GPU, whatever the two others do"
    divided = predictor(2, server=server(4, 2)).took(drawn)  # two engines with four sequences each
    assert divided.compute == pytest.approx(alone.compute / 4)
    assert divided.memory == pytest.approx((5 * 2 * 1_900 + drawn.keys / 2 * KV) / (BANDWIDTH * MEMORY * 2))


@pytest.mark.parametrize(
    ("sharding", "is_full", "gathered", "sent"),
    [
        ("none", True, 0, 2 * 1_100 + 4 * 800),
        ("fsdp", True, 4 * 1_900, 4 * 1_900),
        ("fsdp", False, 2 * 1_900, 4 * 1_100 + 2 * 800),
    ],
)
def test_weights_are_gathered_and_sent_before_each_call(sharding: str, is_full: bool, gathered: int, sent: int):
    found = predictor(2, sharding, is_full=is_full, server=server(4, 1))
    seconds = ring(gathered, 2) + sent / (1e3 * NETWORK)
    assert found.transfer(SHAPE) == pytest.approx(seconds)
    drawn = drawing(SHAPE, "rollout", [10] * 8, per_prompt=1, mean=5.0, longest=5, rows=2, calls=3)
    assert found.took(drawn).network == pytest.approx(3 * seconds)


def test_an_engine_of_a_server_has_as_few_gpus_as_hold_the_model():
    least = 2 * 1_900 + KV * 15
    for memory, expected in ((least / SERVER_SHARE + 1, 1), (least / 2, 3), (least / 12, None)):
        found = Server.on(replace(cluster(9), memory=memory), SHAPE, 15)
        assert (None if found is None else found.engine_gpus) == expected
    assert server(9, 3).engines == 3


def test_what_a_server_draws_during_the_update_takes_no_time():
    drawn = drawing(SHAPE, "rollout", [10] * 8, per_prompt=1, mean=5.0, longest=5, rows=2)
    overlapping = Recipe.model_validate(
        {"model": {"path": "m", "precision": "bfloat16"}, "generation": {"vllm_server": "http://localhost:1"},
         "ppo": {"rewards": [{"function": "f.py:score"}], "steps": 1, "overlap_rollouts": True}}
    )  # fmt: skip
    one_by_one = predictor(server=server(1, 1))
    together = replace(one_by_one, recipe=overlapping)
    for work in (TRAIN, replace(TRAIN, flops=3.0, trained=0)):
        both = Workload(1, "prompts", (drawn, work))
        before, after = one_by_one.phases(both), together.phases(both)
        left = before["rollout"].total - before["update"].total
        assert after["rollout"].total == pytest.approx(max(before["rollout"].network, left))
        assert after["update"] == before["update"]


def test_vllm_draws_as_many_rows_as_its_share_holds():
    drawn = drawing(SHAPE, "rollout", [10] * 8, per_prompt=1, mean=5.0, longest=5, rows=2)
    context = 12.5 * KV
    for rows, steps in ((8, 5), (4, 10), (1, 40)):
        memory = 2 * (2 * 1_900 + (rows + 0.5) * context)
        small = replace(cluster(), memory=memory)
        took = predictor(engine="vllm", cluster=small).took(drawn)
        assert took.memory == pytest.approx((steps * 2 * 1_900 + drawn.keys * KV) / (BANDWIDTH * MEMORY))


def test_phases_are_sums_and_one_process_does_what_is_not_divided():
    works = (FORWARD, FORWARD, TRAIN, replace(FORWARD, phase="save"), Work("eval", "forward", 1.0, 1e6))
    found = predictor(2).phases(Workload(1, "prompts", works))
    assert found.keys() == {"passes", "update"}
    assert found["passes"].total == pytest.approx(2 * predictor(2).took(FORWARD).total)
    alone = replace(FORWARD, each=1)
    assert predictor(2).took(alone).total == pytest.approx(1e6 / (PEAK * COMPUTE))


def test_the_limit_is_what_takes_longest():
    assert Took(3.0, 1.0, 3.0, 2.0).limit == "memory bandwidth"
    assert (Took(1.0, 1.0, 0.0, 0.0) + Took(2.0, 0.0, 0.0, 2.0)).limit == "interconnect"


# Memory


def memory(processes: int, *, reward: ModelShape | None = None, **changes: Any) -> dict[str, Any]:
    settings = recipe(**changes)
    extent = Extent(SHAPE, reward, processes=processes, tokens=10, prompt=10, device=100_000)
    return {name: dict(roles) for name, roles in ppo_memory(settings.section("ppo"), settings, extent).phases.items()}  # type: ignore[attr-defined]


def test_shards_divide_weights_gradients_and_moments():
    whole, half = memory(1, adapter="none"), memory(2, sharding="fsdp", adapter="none")
    for role in ("policy", "critic", "reference", "gradients", "optimizer"):
        assert half["update"][role] == whole["update"][role] / 2
    assert half["update"]["activations"] == whole["update"]["activations"]
    block = (1_900 - 800) // 2
    assert half["passes"]["gathered"] == (2 * block + 800) * 2
    assert half["update"]["gathered"] == (2 * block + 800) * 2 + (block + 800) * (2 + 4)
    assert half["rollout"]["gathered"] == 1_900 * 2, "the torch engine holds the whole policy"
    assert "gathered" not in memory(2, adapter="none")["update"], "not sharded"


def test_a_reward_model_of_its_own_is_divided_too_and_so_is_what_is_loaded_and_saved():
    reward = replace(SHAPE, weights=2_900)  # blocks of (2,900 - 800) / 2
    whole, half = (memory(n, reward=reward, sharding=kind, adapter="none") for n, kind in ((1, "none"), (2, "fsdp")))
    assert whole["passes"]["reward model"] == 2_900 * 2
    assert half["passes"]["reward model"] == half["rollout"]["reward model"] == 2_900 * 2 / 2
    assert half["passes"]["gathered"] == (2 * 1_050 + 800) * 2, "of the larger of the two"
    block = (2 * 550 + 800) * 4
    assert half["load"] == {name: whole["load"][name] / 2 for name in whole["load"]} | {"gathered": block}
    others = 1_900 * 4 / 2 + 2_900 * 2 / 2 + 2 * 1_900 * 4 / 2  # reference, reward model, critic and what was written
    assert half["save"] == {"policy": 1_900 * 4 / 2, "gathered": block, "other models": others}


@pytest.mark.parametrize(
    ("changes", "rollout"),
    [
        pytest.param({}, {"gathered": 1_900 * 2}, id="the torch engine holds the whole policy"),
        pytest.param({"engine": "vllm"}, {"gathered": (2 * 550 + 800) * 2}, id="layer after layer"),
    ],
)
def test_stages_that_only_sample_divide_the_policy_too(changes: dict[str, Any], rollout: dict[str, int]):
    extent = Extent(SHAPE, processes=2, prompt=10, device=100_000)
    found = sampling_memory(StageSamplingSettings(), recipe("fsdp", **changes), extent).phases
    assert found["rollout"]["policy"] == found["load"]["policy"] == 1_900 * 2 / 2
    assert rollout.items() <= found["rollout"].items()
    whole = sampling_memory(StageSamplingSettings(), recipe(**changes), extent).phases["rollout"]
    assert whole["policy"] == 1_900 * 2
    assert "gathered" not in whole


def test_policies_of_save_steps_are_copied_beside_all_that_trains():
    settings = recipe("fsdp", adapter="none")
    ppo = settings.section("ppo").model_copy(update={"save_steps": 1})  # type: ignore[attr-defined]
    phases = ppo_memory(ppo, settings, Extent(SHAPE, processes=2, tokens=10, prompt=10)).phases  # type: ignore[arg-type]
    held = {role: phases["passes"][role] for role in ("policy", "critic", "reference", "optimizer")}
    copied = {"copy to write": 1_900 * 4 // 2, "gathered": (2 * 550 + 800) * 4}
    assert phases["save_steps"] == held | copied
    on_cpu = ppo_memory(ppo, recipe(adapter="none"), Extent(SHAPE, on_cpu=True, tokens=10, prompt=10)).phases  # type: ignore[arg-type]
    held = {role: on_cpu["update"][role] for role in ("policy", "critic", "optimizer", "process")}
    assert on_cpu["save_steps"] == held | {"copied policy": 1_900 * 4, "copy to write": 1_900 * 4}
    assert "save_steps" not in memory(2, sharding="fsdp", adapter="none")


def test_gloo_holds_a_copy_of_what_a_message_carries():
    found = recipe("fsdp", adapter="none")

    def gathered(shape: ModelShape, *, on_cpu: bool) -> dict[str, int]:
        extent = Extent(shape, on_cpu=on_cpu, processes=2, tokens=10, prompt=10)
        phases = ppo_memory(found.section("ppo"), found, extent).phases  # type: ignore[arg-type]
        return {phase: phases[phase]["gathered"] for phase in ("load", "passes", "update", "save")}

    def copied(shape: ModelShape) -> dict[str, int]:
        alone = gathered(shape, on_cpu=False)
        return {phase: size - alone[phase] for phase, size in gathered(shape, on_cpu=True).items()}

    outside, block = 800, 2_000
    assert copied(SHAPE) == {"load": 4 * outside, "passes": 2 * outside, "update": 4 * outside, "save": 4 * outside}
    large = replace(SHAPE, weights=outside + 2 * block)  # of two layers
    assert copied(large) == {"load": 4 * block, "passes": 2 * block, "update": 4 * block, "save": 4 * block}


def test_a_policy_is_gathered_to_draw_with_its_adapters_and_on_a_cpu_beside_a_message_and_its_copy():
    found = recipe("fsdp", adapter="lora")
    ppo = found.section("ppo")
    adapters = 4 * 2 * SHAPE.adapter(ppo.lora.rank)  # type: ignore[attr-defined]
    for on_cpu, sent in ((False, 0), (True, 2 * 800 * 2)):
        extent = Extent(SHAPE, on_cpu=on_cpu, processes=2, tokens=10, prompt=10)
        rollout = ppo_memory(ppo, found, extent).phases["rollout"]  # type: ignore[arg-type]
        assert rollout["gathered"] == 1_900 * 2 + adapters + sent


def test_gathered_weights_are_bfloat16_and_adapters_of_policy_and_critic_float32():
    found = memory(2, sharding="fsdp", adapter="lora")
    adapter = SHAPE.adapter(recipe().ppo.lora.rank) / 2 * 4  # of one of two blocks, in float32
    assert found["passes"]["gathered"] == (2 * 550 + 800) * 2 + 2 * 2 * adapter
    assert found["update"]["gathered"] == found["passes"]["gathered"] + 2 * adapter, "gradients of one, and their sum"
    assert found["rollout"]["reference"] == 1_900 * 2 / 2


def test_groups_hold_more_than_all_processes_and_host_memory_is_not_counted():
    found = recipe("fsdp", sharding_size=2, adapter="none")
    extent = Extent(SHAPE, processes=4, tokens=10, prompt=10)

    def update(**changes: object) -> dict[str, int]:
        changed = found.model_copy(update={"model": found.model.model_copy(update=changes)})  # type: ignore[attr-defined]
        return dict(ppo_memory(changed.section("ppo"), changed, extent).phases["update"])

    half = update()
    assert half["policy"] == half["gradients"] // 2 == 1_900 * 4 / 2
    offloaded = update(sharding_cpu_offload=True)
    assert half.keys() - offloaded.keys() == {"policy", "critic", "reference", "gradients", "optimizer"}
    assert offloaded["gathered"] == half["gathered"]


def test_a_process_holds_what_it_sends_to_a_server_and_not_the_whole_policy():
    found = memory(2, sharding="fsdp", adapter="none")["rollout"]
    settings = recipe("fsdp", adapter="none")
    served = settings.model_copy(  # type: ignore[attr-defined]
        update={"generation": settings.generation.model_copy(update={"vllm_server": "http://localhost:1"})}
    )
    extent = Extent(SHAPE, processes=2, tokens=10, prompt=10)
    drawing = ppo_memory(served.section("ppo"), served, extent).phases["rollout"]
    assert found.keys() - drawing.keys() == {"gathered", "cache", "logits"}
    assert drawing["sent"] == 4 * 1_900


def test_vllm_takes_its_share_or_what_it_needs():
    assert memory(1, engine="vllm", share=0.5)["rollout"]["vLLM"] == 50_000
    least = 2 * 1_900 + KV * 100
    settings = {"engine": "vllm", "gpu_memory_utilization": 0.01}
    for size in (1, 2):
        generation = GenerationSettings.model_validate(settings | {"tensor_parallel_size": size})
        assert vllm_share(SHAPE, generation, Extent(SHAPE, device=100_000), 100) == least / size


def test_the_gpus_of_an_engine_divide_its_work_and_its_keys():
    drawn = drawing(SHAPE, "rollout", [10] * 8, per_prompt=1, mean=5.0, longest=5, rows=2)
    alone = predictor(4, engine="vllm").took(drawn)
    recipe_of_two = recipe(engine="vllm")
    divided = {"generation": recipe_of_two.generation.model_copy(update={"tensor_parallel_size": 2})}
    took = predictor(4, recipe=recipe_of_two.model_copy(update=divided)).took(drawn)  # type: ignore[attr-defined]
    assert took.compute == pytest.approx(alone.compute), "twice the sequences on two GPUs"
    assert took.memory == pytest.approx((5 * 2 * 1_900 + drawn.keys / 2 * KV) / (BANDWIDTH * MEMORY * 2))


def test_vllm_holds_the_whole_policy_of_a_sharded_run_and_gets_it_layer_by_layer():
    found = memory(2, sharding="fsdp", engine="vllm", share=0.5, adapter="none")["rollout"]
    block = (1_900 - 800) // 2
    assert found["vLLM"] == 50_000
    assert found["gathered"] == (2 * block + 800) * 4, "in float32, before vLLM rounds it"
    assert found["policy"] == 4 * 1_900 / 2
    assert "gathered" not in memory(2, engine="vllm", share=0.5, adapter="none")["rollout"]


def test_a_sharded_policy_is_gathered_as_it_is_trained_before_vllm_draws():
    drawn = drawing(SHAPE, "rollout", [10], per_prompt=1, mean=5.0, longest=5, rows=1)
    for engine, is_full, number in (("vllm", True, 4), ("vllm", False, 2), ("torch", True, 2)):
        took = predictor(2, "fsdp", engine, is_full=is_full).took(drawn)
        assert took.network == pytest.approx(ring(number * 1_900, 2))


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_the_copy_of_a_checkpoint_is_counted_on_a_cpu_while_training_goes_on(adapter: str):
    settings, extent = recipe(adapter=adapter), Extent(SHAPE, on_cpu=True, tokens=10, prompt=10)
    wanted = settings.model_copy(update={"checkpoint_async": True})
    before, after = (ppo_memory(one.section("ppo"), one, extent).phases for one in (settings, wanted))  # type: ignore[attr-defined]
    for phase in ("rollout", "passes", "update"):
        roles = after[phase]
        trained = roles["policy"] + roles["critic"]
        assert roles["checkpoint copy"] == trained + roles["optimizer"] == 3 * trained
        assert roles.keys() - before[phase].keys() == {"checkpoint copy"}
    assert after["save"] == before["save"]


@pytest.mark.parametrize(
    ("model", "wanted", "processes", "machine", "expected"),
    [
        ({}, True, 1, 0, 12_000),
        ({}, True, 8, 4, 12_000),  # process 0 alone copies
        ({"sharding": "fsdp"}, True, 8, 4, 6_000),
        ({"sharding": "fsdp", "sharding_size": 2}, True, 8, 4, 12_000),
        ({"sharding": "fsdp", "sharding_cpu_offload": True}, True, 8, 4, 6_000),
        ({}, False, 1, 0, 0),
    ],
)
def test_host_memory_for_the_copy_of_a_checkpoint(model: dict, wanted: bool, processes, machine, expected):
    settings = recipe().model_copy(update={"checkpoint_async": wanted})
    settings = settings.model_copy(update={"model": settings.model.model_copy(update=model)})
    section = settings.section("ppo")  # type: ignore[attr-defined]
    assert host_copy(section, settings, Extent(SHAPE, processes=processes, machine=machine), 1_000) == expected
    assert host_copy(section, settings, Extent(SHAPE, on_cpu=True), 1_000) == 0
    assert host_copy(section, settings, Extent(SHAPE), 0) == 0


def test_the_copy_of_moments_in_8_bits_takes_less_host_memory():
    settings = recipe(adapter="none").model_copy(update={"checkpoint_async": True})
    section = settings.section("ppo").model_copy(update={"optimizer": "adamw-8bit", "critic": "head"})  # type: ignore[attr-defined]
    whole = min(5_000, SHAPE.embeddings)
    small = 5_000 - whole
    expected = 4 * 5_000 + 8 * whole + 2 * small * (1 + 4 / 256)
    assert host_copy(section, settings, Extent(SHAPE), 5_000) == pytest.approx(expected, abs=1)
    assert expected < 12 * 5_000


def test_a_micro_batch_has_at_most_the_own_sequences_of_a_process():
    work = Workload(1, "prompts", (replace(TRAIN, rows=8),), largest=80)
    target = Target(cluster(4))
    assert target.extent(Extent(SHAPE, tokens=80), work).tokens == 40, "four of sixteen sequences, where eight may be"
    assert target.extent(Extent(SHAPE, tokens=80), Workload(1, "prompts", ())).tokens == 80


def test_a_share_that_is_too_small_for_vllm_is_said():
    draws = Workload(1, "prompts", (drawing(SHAPE, "rollout", [10], per_prompt=1, mean=5.0, longest=5, rows=1),))
    target, extent = Target(replace(cluster(), memory=10_000)), Extent(SHAPE, prompt=10)
    least = (2 * 1_900 + 15 * KV) / 10_000
    assert target.notes(recipe(engine="vllm", share=0.9), extent, draws) == ()
    (note,) = target.notes(recipe(engine="vllm", share=0.1), extent, draws)
    assert f"{least + 0.005:.2f}" in note
    (note,) = Target(replace(cluster(), memory=3_000)).notes(recipe(engine="vllm"), extent, draws)
    assert "too large" in note
    assert target.notes(recipe(), extent, draws) == ()
