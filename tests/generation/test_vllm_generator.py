"""`VLLMGenerator` against a stand-in for vLLM: the contract of a completion, the order of calls, errors."""

from __future__ import annotations

import dataclasses
import os
import random
from contextlib import nullcontext

import pytest
import torch

from rlhf_cli.errors import DivergedError, Interrupted, ModelError
from rlhf_cli.generation.engine_group import EngineGroup
from rlhf_cli.generation.generator import Request
from rlhf_cli.generation.logprobs import Projection, completion_hidden
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.sequence_batch import SequenceBatch
from rlhf_cli.generation.vllm_generator import VLLMGenerator, obstacle, obstacle_of_size, obstacle_of_weights
from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.multi_adapter import MultiAdapterModel
from rlhf_cli.settings.shared import GenerationSettings, LoraSettings
from tests.generation.vllm_stand_in import vllm

__all__ = ["vllm"]

PROMPTS = [[5, 6, 7, 8], [9], [3, 4, 5, 6, 7, 8, 9], [10, 11]]
REQUESTS = [Request(ids, seed) for ids, seed in zip(PROMPTS, (2**62, 1, 2, 3), strict=True)]


def policy_at(folder, *, trains: bool = False, stop_ids: set[int] | None = None, **sampling) -> Policy:
    source = ModelSource(str(folder))
    model = load_policy(source) if trains else None
    weights = None if model is None else lambda: nullcontext(model)
    policy = Policy.load(source, Sampling(**{"max_new_tokens": 12} | sampling), weights=weights)
    if stop_ids is not None:
        policy.stop_ids = stop_ids
    return policy


def generator(**settings) -> VLLMGenerator:
    return VLLMGenerator(GenerationSettings(**settings), longest_prompt=16)


@torch.no_grad()
def scored(policy: Policy, prompts, completions) -> list[list[float]]:
    with policy.model() as model:
        batch = SequenceBatch.for_model(model, prompts, [one.ids for one in completions])
        hidden = completion_hidden(model, batch)
        found = Projection.of(model).token_logprobs(hidden, batch, temperature=policy.sampling.temperature).logprobs
    return [row[: len(one.ids)].tolist() for row, one in zip(found, completions, strict=True)]


def test_a_request_becomes_one_with_its_own_seed_and_nothing_of_the_model_s_generation_config(vllm, tiny_llama):
    policy = policy_at(tiny_llama, stop_ids={3, 200}, temperature=0.7, top_p=0.9)
    generator().generate(policy, REQUESTS)
    (llm,) = vllm.made
    drawn = llm.parameters[-len(REQUESTS) :]
    assert [one.seed for one in drawn] == [request.seed for request in REQUESTS]
    plain = {(one.n, one.temperature, one.top_p, one.top_k, one.min_p, one.max_tokens, one.logprobs) for one in drawn}
    assert plain == {(1, 0.7, 0.9, 0, 0.0, 12, 0)}
    assert all(one.stop_token_ids == [3, 200] and one.ignore_eos for one in drawn)
    assert not any(one.detokenize for one in drawn)


def test_a_completion_ends_at_a_stop_token_which_it_includes(vllm, tiny_llama):
    policy = policy_at(tiny_llama, stop_ids=set(range(0, 320, 4)), max_new_tokens=6)
    drawn = generator().generate(policy, [Request([5, 6], seed) for seed in range(40)])
    assert {one.finished for one in drawn} == {True, False}
    for one in drawn:
        stops = [token for token in one.ids if token % 4 == 0]
        assert one.finished == bool(stops)
        assert one.ids[-1:] == stops or len(one.ids) == 6
        assert one.text == policy.decode(one.ids)


def test_a_completion_is_a_function_of_prompt_and_seed_and_in_the_order_of_requests(vllm, tiny_llama):
    policy = policy_at(tiny_llama)
    together = generator().generate(policy, REQUESTS)
    alone = [generator().generate(policy, [request])[0] for request in REQUESTS]
    assert [one.ids for one in together] == [one.ids for one in alone]
    assert len({tuple(one.ids) for one in generator().generate(policy, [Request([5], seed) for seed in range(6)])}) > 1


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probabilities_are_those_of_the_distribution_that_is_drawn_from(vllm, tiny_llama, temperature):
    policy = policy_at(tiny_llama, temperature=temperature)
    drawn = generator().generate(policy, REQUESTS)
    for one, expected in zip(drawn, scored(policy, PROMPTS, drawn), strict=True):
        assert one.logprobs == pytest.approx(expected, abs=1e-4)
    (llm,) = vllm.made
    assert llm.arguments["logprobs_mode"] == "processed_logprobs"


def test_a_policy_that_trains_hands_its_weights_over_each_time_and_the_engine_sleeps_between(vllm, tiny_llama):
    policy = policy_at(tiny_llama, trains=True)
    draws = generator()
    draws.start(policy)
    (llm,) = vllm.made
    assert llm.calls == ["load", "reset", "sleep 2"]
    llm.calls.clear()
    first = draws.generate(policy, REQUESTS)
    assert llm.calls == ["wake weights", "load", "reset", "wake kv_cache", "sleep 2"]
    with policy.model() as model, torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    second = draws.generate(policy, REQUESTS)
    assert [one.ids for one in first] != [one.ids for one in second]
    for one, expected in zip(second, scored(policy, PROMPTS, second), strict=True):
        assert one.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_policy_that_does_not_train_hands_its_weights_over_once_until_it_is_released(vllm, tiny_llama):
    policy, other = policy_at(tiny_llama), policy_at(tiny_llama)
    draws = generator()
    draws.start(policy)
    for _ in range(2):
        draws.generate(policy, REQUESTS)
    (llm,) = vllm.made
    assert llm.calls == ["load", "reset"]
    draws.generate(other, REQUESTS)
    assert llm.calls == ["load", "reset"] * 2
    policy.release()
    other.release()
    assert llm.calls == ["load", "reset"] * 2 + ["sleep 2"]
    draws.generate(policy, REQUESTS)
    assert llm.calls[-4:] == ["wake weights", "load", "reset", "wake kv_cache"]


def test_processes_of_a_sharded_policy_form_their_groups_before_an_engine_exists(vllm, tiny_llama, monkeypatch):
    """All processes of the run make them together; in a step, each would wait for the engines of the others."""
    engines: list[int] = []
    monkeypatch.setattr(EngineGroup, "members", property(lambda self: engines.append(len(vllm.made))))
    monkeypatch.setattr("rlhf_cli.generation.vllm_generator.is_sharded", lambda model: True)
    generator().start(policy_at(tiny_llama))
    assert engines[0] == 0
    assert len(vllm.made) == 1


def test_the_active_adapter_is_in_the_weights_that_are_handed_over(vllm, tiny_llama):
    adapters = MultiAdapterModel(load_policy(ModelSource(str(tiny_llama))))
    for name in ("policy", "critic"):
        adapters.add(name, LoraSettings(rank=4, alpha=8.0))
        torch.manual_seed(len(name))
        with torch.no_grad():
            for weight in adapters.parameters(name):
                weight.normal_(std=0.2)
    policy = Policy.load(
        ModelSource(str(tiny_llama)), Sampling(max_new_tokens=12), weights=lambda: adapters.use_adapter("policy")
    )
    drawn = generator().generate(policy, REQUESTS)
    for one, expected in zip(drawn, scored(policy, PROMPTS, drawn), strict=True):
        assert one.logprobs == pytest.approx(expected, abs=1e-4)
    (llm,) = vllm.made
    assert not [name for name in llm.names if "lora" in name or "base_layer" in name]


def test_how_the_engine_is_made(vllm, tiny_llama):
    random.seed(3)
    torch.manual_seed(3)
    before = random.getstate(), torch.get_rng_state()
    generator(gpu_memory_utilization=0.4).start(policy_at(tiny_llama))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1]), "the run's random numbers are its own"
    (llm,) = vllm.made
    expected = {
        "dtype": "float32",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "gpu_memory_utilization": 0.4,
        "enable_sleep_mode": True,
        "generation_config": "vllm",
        "model_impl": "vllm",
        "distributed_executor_backend": "uni",
        "tensor_parallel_size": 1,
    }
    assert llm.arguments.items() >= expected.items()
    assert llm.config.architectures == ["LlamaForCausalLM"]
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"


def test_one_of_several_processes_makes_its_own_engine_in_their_group(vllm, tiny_llama, monkeypatch):
    joined = []
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "::1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("rlhf_cli.generation.vllm_engine.join", lambda: joined.append(len(vllm.made)))
    generator().start(policy_at(tiny_llama))
    (llm,) = vllm.made
    assert llm.arguments["distributed_executor_backend"] == "external_launcher"
    assert joined == [0], "vLLM finds the group of processes when it starts"
    assert generator().generate(policy_at(tiny_llama), []) == [], "a process may have nothing to sample"


def test_a_process_has_one_engine_for_all_models_of_one_shape(vllm, tiny_llama, tiny_gpt2):
    policy = policy_at(tiny_llama)
    for _ in range(2):
        generator().generate(policy, REQUESTS)
    generator().generate(policy_at(tiny_llama, trains=True, max_new_tokens=20), REQUESTS)
    assert len(vllm.made) == 1
    with pytest.raises(ModelError, match="one engine") as caught:
        generator().generate(policy_at(tiny_gpt2), REQUESTS)
    assert "generation.engine=torch" in caught.value.hint


def test_progress_and_stop(vllm, tiny_llama):
    policy, done = policy_at(tiny_llama, trains=True), []
    generator().generate(policy, REQUESTS, progress=done.append)
    assert sum(done) == len(REQUESTS)

    def stop():
        raise Interrupted(15)

    (llm,) = vllm.made
    with pytest.raises(Interrupted):
        generator().generate(policy, REQUESTS, stop=stop)
    assert len(llm.aborted) == len(REQUESTS)
    assert not llm.has_unfinished_requests()
    assert llm.calls[-1] == "sleep 2"
    assert len(generator().generate(policy, REQUESTS)) == len(REQUESTS)


def fail(error: Exception):
    def before_step():
        raise error

    return before_step


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "says"),
    [
        pytest.param(RuntimeError("EngineCore encountered an issue.\nmore"), "EngineCore encountered", id="dies"),
        pytest.param(OutOfMemoryError("CUDA out of memory. Tried to"), "CUDA out of memory", id="memory"),
    ],
)
def test_what_vllm_raises_says_what_to_do(error, says, vllm, tiny_llama, monkeypatch):
    policy = policy_at(tiny_llama, trains=True)
    draws = generator()
    draws.start(policy)
    monkeypatch.setattr(vllm, "before_step", staticmethod(fail(error)))
    with pytest.raises(ModelError, match=f"vllm failed while sampling: .*{says}") as caught:
        draws.generate(policy, REQUESTS)
    assert "\n" not in caught.value.message
    assert "generation.engine=torch" in caught.value.hint
    assert "gpu_memory_utilization` than 0.3" in caught.value.hint
    assert vllm.made[0].calls[-1] == "sleep 2", "its memory is free again"


def test_an_engine_that_cannot_start_says_so(vllm, tiny_llama, monkeypatch):
    message = "Free memory on device cuda:0 (10.0/80.0 GiB) on startup is less than desired GPU memory utilization"
    monkeypatch.setattr(vllm, "__init__", lambda self, **arguments: fail(ValueError(message))())
    with pytest.raises(ModelError, match="vllm failed while starting: ValueError: Free memory") as caught:
        generator().start(policy_at(tiny_llama))
    assert "gpu_memory_utilization" in caught.value.hint


def test_other_weights_than_the_engine_knows_are_an_error(vllm, tiny_llama, monkeypatch):
    monkeypatch.setattr(
        "rlhf_cli.generation.vllm_generator.merged_weights", lambda model: iter([("model.wrong", torch.zeros(1))])
    )
    with pytest.raises(ModelError, match=r"taking the policy's weights: ValueError: There is no module .*model\.wrong"):
        generator().start(policy_at(tiny_llama))


def test_an_engine_with_other_probabilities_is_refused(vllm, tiny_llama, monkeypatch):
    monkeypatch.setattr(vllm, "off_by", 9.0)
    with pytest.raises(ModelError, match=r"vllm and the policy .* disagree: .*differ by .* nats") as caught:
        generator().start(policy_at(tiny_llama))
    assert "LlamaForCausalLM" in caught.value.hint


def test_probabilities_that_are_not_finite_are_a_divergence(vllm, tiny_llama):
    policy = policy_at(tiny_llama, trains=True)
    draws = generator()
    draws.start(policy)
    (llm,) = vllm.made
    complete = llm.complete

    def broken(prompt, parameters):
        output = complete(prompt, parameters)
        (entry,) = output.logprobs[0].values()
        entry.logprob = float("nan")
        return output

    llm.complete = broken
    with pytest.raises(DivergedError):
        draws.generate(policy, REQUESTS)


def test_an_ending_that_is_neither_a_stop_token_nor_the_limit_is_an_error(vllm, tiny_llama, monkeypatch):
    policy = policy_at(tiny_llama)
    draws = generator()
    draws.start(policy)
    monkeypatch.setattr(vllm, "finish_reason", "abort")
    with pytest.raises(ModelError, match="for the reason `abort`"):
        draws.generate(policy, REQUESTS)


def test_an_empty_prompt_is_an_error(vllm, tiny_llama):
    with pytest.raises(ModelError, match="no tokens"):
        generator().generate(policy_at(tiny_llama), [Request([], 1)])


def on_cuda(folder, sampling: Sampling = Sampling(), **source) -> Policy:  # noqa: B008  (frozen)
    """A policy that says that it is on a GPU; its weights are on the CPU."""
    model = load_policy(ModelSource(str(folder)))
    policy = Policy.load(ModelSource(str(folder)), sampling, weights=lambda: nullcontext(model))
    policy.source = dataclasses.replace(policy.source, device=torch.device("cuda"), **source)
    return policy


@pytest.mark.parametrize(
    ("prepared", "reason"),
    [
        pytest.param(policy_at, "the device is `cpu`", id="CPU"),
        pytest.param(lambda folder: on_cuda(folder, trust_remote_code=True), "code of its own", id="code"),
        pytest.param(lambda folder: on_cuda(folder, Sampling(temperature=0.001)), "temperature of 0.01", id="cold"),
        pytest.param(on_cuda, None, id="nothing"),
    ],
)
def test_what_keeps_vllm_from_a_policy(prepared, reason, vllm, tiny_llama):
    found = obstacle([prepared(tiny_llama)])
    assert (found is None) if reason is None else (reason in found.reason and found.fix)


@pytest.mark.parametrize(
    ("version", "reason", "fix"),
    [
        (None, "not installed", "docs/generation.md"),
        ("0.33.0", "vllm 0.33.0 is installed, and only 0.32 is supported", "vllm==0.32"),
        ("0.3.2", "vllm 0.3.2 is installed", "vllm==0.32"),
        ("0.32.1", None, None),
    ],
)
def test_another_version_of_vllm_is_not_used(version, reason, fix, vllm, tiny_llama, monkeypatch):
    monkeypatch.setattr("rlhf_cli.generation.vllm_generator.installed_version", lambda: version)
    found = obstacle([on_cuda(tiny_llama)])
    assert (found is None) if reason is None else (reason in found.reason and fix in found.fix)


def test_models_that_vllm_does_not_have(vllm, tiny_t5, tiny_llama, monkeypatch):
    assert "encoder-decoder" in obstacle([on_cuda(tiny_t5)]).reason
    monkeypatch.setattr("tests.generation.vllm_stand_in.ModelRegistry.get_supported_archs", staticmethod(set))
    assert "no implementation of LlamaForCausalLM" in obstacle_of_weights(policy_at(tiny_llama)).reason
    monkeypatch.setattr("rlhf_cli.generation.vllm_generator.quantized", lambda model: "4bit")
    assert "quantized" in obstacle_of_weights(policy_at(tiny_llama)).reason


def test_a_policy_that_is_too_large_for_vllms_share_or_cannot_be_divided(vllm, tiny_llama, monkeypatch):
    policy = policy_at(tiny_llama)
    with policy.model() as model:
        needed, heads = 4 * model.num_parameters(), policy.config.num_attention_heads
    monkeypatch.setattr("rlhf_cli.generation.vllm_generator.machine_memory", lambda device: needed)
    found = obstacle_of_size(policy, GenerationSettings(gpu_memory_utilization=0.9))
    assert "its weights take" in found.reason
    assert "`generation.tensor_parallel_size`" in found.fix
    assert (
        obstacle_of_size(policy, GenerationSettings(engine="vllm", gpu_memory_utilization=0.9, tensor_parallel_size=2))
        is None
    )
    found = obstacle_of_size(
        policy, GenerationSettings(engine="vllm", gpu_memory_utilization=0.4, tensor_parallel_size=2)
    )
    assert "GB on each of 2 GPUs, and" in found.reason
    found = obstacle_of_size(policy, GenerationSettings(engine="vllm", tensor_parallel_size=heads + 1))
    assert f"its {heads} attention heads cannot be divided among {heads + 1} GPUs" in found.reason


def test_models_of_different_shapes_cannot_share_the_engine_of_a_process(vllm, tiny_llama, tiny_gpt2):
    assert obstacle([on_cuda(tiny_llama), on_cuda(tiny_llama)]) is None
    assert "differ in their architecture" in obstacle([on_cuda(tiny_llama), on_cuda(tiny_gpt2)]).reason
