"""`VLLMServerGenerator` with TRL's client against a stand-in server: weights, seeds, restarts, errors."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rlhf_cli.errors import DivergedError, Interrupted, ModelError, ServerLostError
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.generation.server_generator import VLLMServerGenerator
from rlhf_cli.generation.server_obstacle import server_obstacle
from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.merged_weights import merged_weights
from rlhf_cli.models.multi_adapter import MultiAdapterModel
from rlhf_cli.settings.shared import GenerationSettings, LoraSettings
from tests.generation.server_stand_in import server_of, vllm
from tests.generation.test_vllm_generator import PROMPTS, REQUESTS, on_cuda, policy_at, scored

__all__ = ["server_of", "vllm"]

UPDATE = ["/update_weight_version", "/start_weight_update", "/update_weights", "/finish_weight_update"]
UPDATE += ["/reset_prefix_cache", "/update_weight_version"]


def generator(server, policy: Policy) -> VLLMServerGenerator:
    settings = GenerationSettings(vllm_server=server.url, server_timeout=20.0)
    return VLLMServerGenerator(settings, policy, longest_prompt=16)


@pytest.fixture
def trained(server_of, tiny_llama):
    """A server, a policy that trains, and a started generator."""
    server, policy = server_of(tiny_llama), policy_at(tiny_llama, trains=True)
    draws = generator(server, policy)
    draws.start(policy)
    return server, policy, draws


def change(policy: Policy) -> None:
    with policy.model() as model, torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)


def has_weights_of(server, policy: Policy) -> bool:
    own = server.model.state_dict()
    with policy.model() as model:
        return all(torch.equal(own[name], value.float()) for name, value in merged_weights(model))


def test_a_completion_is_one_request_with_its_own_seed(server_of, tiny_llama):
    server = server_of(tiny_llama)
    policy = policy_at(tiny_llama, stop_ids={3, 200}, temperature=0.7, top_p=0.9)
    draws = generator(server, policy)
    drawn = draws.generate(policy, REQUESTS)
    sent = {tuple(body["prompt"][0]): body for body in server.drawn}
    assert [sent[tuple(one.prompt_ids)]["seed"] for one in REQUESTS] == [one.seed for one in REQUESTS]
    for body in server.drawn:
        kept = {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0.0, "max_tokens": 12, "n": 1, "logprobs": 0}
        assert body.items() >= (kept | {"stop_token_ids": [3, 200], "ignore_eos": True}).items()
    assert [one.ids for one in draws.generate(policy, REQUESTS[::-1])[::-1]] == [one.ids for one in drawn]
    for one in drawn:
        assert one.finished == (one.ids[-1] in (3, 200))
        assert one.text == policy.decode(one.ids)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probabilities_are_those_that_scoring_finds(server_of, tiny_llama, temperature):
    policy = policy_at(tiny_llama, temperature=temperature)
    drawn = generator(server_of(tiny_llama), policy).generate(policy, REQUESTS)
    for one, expected in zip(drawn, scored(policy, PROMPTS, drawn), strict=True):
        assert one.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_policy_that_trains_sends_its_weights_before_each_draw(trained):
    server, policy, draws = trained
    assert draws.version == "0.32.0"
    assert server.paths == ["/init_weight_transfer_engine", *UPDATE]
    server.paths.clear()
    first = draws.generate(policy, REQUESTS)
    change(policy)
    assert not has_weights_of(server, policy)
    second = draws.generate(policy, REQUESTS)
    assert server.paths == UPDATE * 2
    assert has_weights_of(server, policy)
    assert [one.ids for one in first] != [one.ids for one in second]
    for one, expected in zip(second, scored(policy, PROMPTS, second), strict=True):
        assert one.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_policy_that_does_not_train_sends_its_weights_once(server_of, tiny_llama, monkeypatch):
    monkeypatch.setattr("rlhf_cli.generation.vllm_server.CHUNK_BYTES", 4096)
    server, policy, other = server_of(tiny_llama), policy_at(tiny_llama), policy_at(tiny_llama)
    draws = generator(server, policy)
    draws.start(policy)
    draws.generate(policy, REQUESTS)
    assert server.paths.count("/start_weight_update") == 1
    assert server.paths.count("/update_weights") > 3, "in parts"
    assert has_weights_of(server, policy)
    draws.generate(other, REQUESTS)
    draws.generate(policy, REQUESTS)
    assert server.paths.count("/start_weight_update") == 3


def test_weights_of_another_shape_are_not_sent(server_of, tiny_llama, tiny_gpt2):
    server, policy = server_of(tiny_llama), policy_at(tiny_llama)
    draws = generator(server, policy)
    draws.start(policy)
    server.paths.clear()
    with pytest.raises(ModelError, match="has a model of another architecture or size than"):
        draws.generate(policy_at(tiny_gpt2), REQUESTS)
    assert server.paths == []


def test_the_active_adapter_is_merged(server_of, tiny_llama):
    adapters = MultiAdapterModel(load_policy(ModelSource(str(tiny_llama))))
    adapters.add("policy", LoraSettings(rank=4, alpha=8.0))
    with torch.no_grad():
        for weight in adapters.parameters("policy"):
            weight.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    weights = lambda: adapters.use_adapter("policy")  # noqa: E731
    policy = Policy.load(ModelSource(str(tiny_llama)), Sampling(max_new_tokens=12), weights=weights)
    server = server_of(tiny_llama)
    drawn = generator(server, policy).generate(policy, REQUESTS)
    for one, expected in zip(drawn, scored(policy, PROMPTS, drawn), strict=True):
        assert one.logprobs == pytest.approx(expected, abs=1e-4)
    assert not [name for name in server.names if "lora" in name or "base_layer" in name]


def dies_while_it_draws(server):
    server.dies_after, server.comes_back = len(server.drawn) + 2, 0.2


def dies_while_it_takes_weights(server):
    server.dies_in_transfer, server.comes_back = True, 0.2


def restarts_at_once_while_it_takes_weights(server):
    server.dies_in_transfer, server.comes_back = True, 0.0


def died_and_restarted_before(server):
    server.kill()
    server.start()


@pytest.mark.parametrize(
    "loss",
    [
        dies_while_it_draws,
        dies_while_it_takes_weights,
        restarts_at_once_while_it_takes_weights,
        died_and_restarted_before,
    ],
)
def test_a_server_that_comes_back_gets_the_weights_again_and_draws_the_same(loss, trained, capsys):
    server, policy, draws = trained
    change(policy)
    expected = draws.generate(policy, REQUESTS)
    loss(server)
    assert draws.generate(policy, REQUESTS) == expected
    assert has_weights_of(server, policy)
    assert f"the vllm server at {server.url} was lost" in " ".join(capsys.readouterr().err.split())


def test_what_was_drawn_with_other_weights_is_drawn_again(trained):
    server, policy, draws = trained
    expected = draws.generate(policy, REQUESTS)
    pending = draws.begin(policy, REQUESTS)
    server.weights_version = "of another run"
    assert draws.finish(policy, pending) == (expected, False)


def test_a_server_that_stays_away_is_named_with_the_command_that_starts_it(server_of, tiny_llama):
    server, policy = server_of(tiny_llama), policy_at(tiny_llama, trains=True)
    draws = generator(server, policy)
    draws.start(policy)
    server.kill()
    draws._server._patience = 0.2
    with pytest.raises(
        ServerLostError, match=f"{server.url} has not responded for 0.2 s .*onnection refused"
    ) as caught:
        draws.generate(policy, REQUESTS)
    assert f"VLLM_SERVER_DEV_MODE=1 vllm serve {tiny_llama} --weight-transfer-config" in caught.value.hint
    assert "it resumes" in caught.value.hint


class Member:
    """One of two processes that are threads; `all_gather_object` waits for the other one."""

    count = 2

    def __init__(self, index: int, given: list[object], meeting: threading.Barrier) -> None:
        self.index, self.is_main = index, index == 0
        self._given, self._meeting = given, meeting

    def all_gather_object(self, item: object) -> list[object]:
        self._given[self.index] = item
        self._meeting.wait()
        found = [*self._given]
        self._meeting.wait()  # nobody gives the next item before both have read
        return found

    def any(self, flag: bool) -> bool:
        return any(self.all_gather_object(flag))


def test_a_process_that_alone_cannot_reach_the_server_does_not_part_from_the_others(server_of, tiny_llama, capsys):
    server, given, meeting = server_of(tiny_llama), [None, None], threading.Barrier(2, timeout=60)
    policies = [policy_at(tiny_llama, trains=True) for _ in range(2)]
    both = [generator(server, policy) for policy in policies]
    for index, draws in enumerate(both):
        draws._processes = Member(index, given, meeting)
    connect, failures = both[1]._server.connect, [ServerLostError("no route from process 1")]

    def connect_unless_lost(*how: object) -> None:
        if failures:
            raise failures.pop()
        connect(*how)

    both[1]._server.connect = connect_unless_lost
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda draws, policy: draws.generate(policy, REQUESTS), both, policies))
    assert found[0] == found[1]
    said = " ".join(capsys.readouterr().err.split())
    assert "was lost: no route from process 1; its completions are drawn again" in said
    assert "was lost: another process could not reach it; its completions are drawn again" in said


def test_a_server_that_dies_again_and_again_is_given_up(trained):
    server, policy, draws = trained
    server.comes_back = 0.05
    server._complete = lambda body: server.die()
    with pytest.raises(ServerLostError, match="lost 3 times"):
        draws.generate(policy, REQUESTS[:1])


@pytest.mark.parametrize(
    ("changes", "says", "hint"),
    [
        pytest.param({"version": "0.33.1"}, "version 0.33.1, and only 0.32 is supported", "vllm==0.32", id="version"),
        pytest.param({"mode": "raw_logprobs"}, "mode `raw_logprobs`", "processed_logprobs", id="logprobs"),
        pytest.param({"transfer": None}, "weight transfer `None`", "nccl", id="transfer"),
        pytest.param({"is_dev": False}, "development mode", "VLLM_SERVER_DEV_MODE=1", id="development mode"),
        pytest.param({"longest": 20}, "sequences of 20 tokens, and 28 are needed", "--max-model-len 28", id="length"),
    ],
)
def test_a_server_that_was_started_in_another_way_is_refused(changes, says, hint, server_of, tiny_llama):
    server, policy = server_of(tiny_llama), policy_at(tiny_llama)
    vars(server).update(changes)
    with pytest.raises(ModelError, match=says) as caught:
        generator(server, policy).start(policy)
    assert hint in caught.value.hint


def test_other_probabilities_than_the_policy_s_are_refused(vllm, server_of, tiny_llama, monkeypatch):
    server, policy = server_of(tiny_llama), policy_at(tiny_llama)
    monkeypatch.setattr(vllm, "off_by", 9.0)
    with pytest.raises(ModelError, match="disagree"):
        generator(server, policy).start(policy)


def test_what_a_server_in_order_refuses_is_not_tried_again(trained):
    server, policy, draws = trained
    server.refuses = "a value is wrong"
    before = len(server.drawn)
    with pytest.raises(ModelError, match=r"failed while sampling: Request failed: 400, .*a value is wrong"):
        draws.generate(policy, REQUESTS[:1])
    assert len(server.drawn) == before + 1


def test_a_request_that_takes_too_long_says_which_limit_that_is(server_of, tiny_llama):
    server, policy = server_of(tiny_llama), policy_at(tiny_llama)
    draws = generator(server, policy)
    draws.start(policy)
    draws._server._client.session.adapters["http://"]._seconds = 0.3
    server.pause = 0.6
    with pytest.raises(ModelError, match="timed out") as caught:
        draws.generate(policy, REQUESTS[:1])
    assert "generation.server_timeout" in caught.value.hint


def test_a_completion_that_neither_stops_nor_is_full_and_one_without_probabilities(trained, monkeypatch):
    server, policy, draws = trained
    complete = server._complete

    def changed(body, **change):
        answer = complete(body)
        choice = answer["choices"][0]
        if "short" in change:
            choice["token_ids"] = choice["token_ids"][:2]
        choice["logprobs"]["token_logprobs"][0] = float("nan")
        choice["logprobs"]["top_logprobs"][0] = {}
        return answer

    policy.stop_ids = set()
    server._complete = lambda body: changed(body, short=True)
    with pytest.raises(ModelError, match="ended after 2 tokens without a stop token"):
        draws.generate(policy, REQUESTS[:1])
    server._complete = changed
    with pytest.raises(DivergedError):
        draws.generate(policy, REQUESTS[:1])


def test_progress_and_stop(trained):
    _, policy, draws = trained
    done = []
    draws.generate(policy, REQUESTS, progress=lambda completions, tokens: done.append((completions, tokens)))
    assert [one for one, _ in done] == [1] * len(REQUESTS)
    assert all(tokens > 0 for _, tokens in done)

    def stop():
        raise Interrupted(15)

    with pytest.raises(Interrupted):
        draws.generate(policy, REQUESTS, stop=stop)
    assert len(draws.generate(policy, REQUESTS)) == len(REQUESTS)


def test_what_is_drawn_ahead_has_the_weights_of_its_beginning(trained):
    server, policy, draws = trained
    expected = draws.generate(policy, REQUESTS)
    server.pause = 0.05
    pending = draws.begin(policy, REQUESTS)
    change(policy)
    later = draws.generate(policy, REQUESTS)  # waits for what is on its way
    assert draws.finish(policy, pending) == (expected, True)
    assert later != expected
    server.pause = 0.0
    lost = draws.begin(policy, REQUESTS)
    draws.wait(lost)
    lost.drawn = None
    assert draws.finish(policy, lost) == (later, False), "drawn again, with the weights of now"


@pytest.mark.parametrize(
    ("version", "processes", "reason"),
    [
        pytest.param(None, 1, "trl, whose client", id="none"),
        pytest.param("1.15.0", 1, "trl 1.15.0 is installed, and only 1.16 is supported", id="another"),
        pytest.param("1.16.3", 2, "several models take turns", id="processes"),
        pytest.param("1.16.3", 1, None, id="nothing"),
    ],
)
def test_what_keeps_a_server_from_a_stage(version, processes, reason, vllm, tiny_llama, monkeypatch):
    monkeypatch.setattr("rlhf_cli.generation.server_obstacle.client_version", lambda: version)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    policies = [on_cuda(tiny_llama), on_cuda(tiny_llama)]
    found = server_obstacle(policies)
    assert (found is None) if reason is None else (found.fix and reason in found.reason)


def test_a_package_that_the_client_needs_is_named(vllm, tiny_llama, monkeypatch):
    monkeypatch.setattr("rlhf_cli.generation.server_obstacle.client_version", lambda: "1.16.3")
    monkeypatch.setitem(sys.modules, "requests", None)  # as if it was not installed
    found = server_obstacle([on_cuda(tiny_llama)])
    assert found is not None
    assert "requests" in found.reason
    assert "requests" in found.fix
