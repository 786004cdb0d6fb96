"""Replies of several models to the same turns, what is measured of them, and what becomes a label."""

from __future__ import annotations

import json
import shutil
import threading
from copy import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from rlhf_cli.chat.conversation import Conversation
from rlhf_cli.chat.files import ChatFiles
from rlhf_cli.chat.loading import BackgroundLoading
from rlhf_cli.chat.models import ChatModels, find_models
from rlhf_cli.data.records import Message, seed_for
from rlhf_cli.data.sources import read_records
from rlhf_cli.errors import DataError, UsageError
from rlhf_cli.generation.generator import Request
from rlhf_cli.generation.policy import Policy
from rlhf_cli.generation.torch_generator import TorchGenerator, stream
from rlhf_cli.settings.shared import SamplingSettings

SHORT = SamplingSettings(max_new_tokens=8)


def ignore(name, text):
    pass


@pytest.fixture
def models(tiny_llama) -> ChatModels:
    """Two models with the same weights; the KL of the second is measured to the first."""
    (model,) = find_models([str(tiny_llama)], only=(), sampling=SHORT).models
    (other,) = find_models([str(tiny_llama)], only=(), sampling=SHORT).models
    return ChatModels((replace(model, name="sft"), replace(other, name="ppo", reference="sft")))


def test_all_models_answer_the_same_prompt_as_the_generator_draws_it(models):
    conversation = Conversation(models, seed=3)
    first, second = conversation.ask("Why is the sky blue?", ignore)
    assert (first.model, second.model) == ("sft", "ppo")
    assert first.completion == second.completion, "equal weights and random numbers"
    assert second.kl == pytest.approx(0.0, abs=1e-5)
    assert first.kl is None
    assert first.reward is None
    (again,) = {reply.completion.text for reply in conversation.again(ignore)}
    assert again != first.completion.text


def test_the_text_is_shown_token_by_token(models):
    seen: list[str] = []
    conversation = Conversation(ChatModels(models.models[:1]))
    (reply,) = conversation.ask("Hello", lambda name, text: seen.append(text))
    assert len(seen) == len(reply.completion.ids)
    assert seen[-1].strip("\ufffd") == reply.completion.text.strip("\ufffd")


def test_all_models_write_at_once_and_each_as_it_writes_alone(models):
    """A token of each in turn; what a model writes depends on no other."""
    told: list[str] = []
    both = list(Conversation(models, seed=5).ask("Hello", lambda name, text: told.append(name)))
    shortest = min(len(reply.completion.ids) for reply in both)
    assert told[: 2 * shortest] == ["sft", "ppo"] * shortest
    for model, reply in zip(models.models, both, strict=True):
        request = Request(model.policy.prompt_ids("Hello"), seed_for("Hello", 5, 0))
        assert reply.completion == TorchGenerator().generate(model.policy, [request])[0]
        (alone,) = Conversation(ChatModels((replace(model, reference=None),)), seed=5).ask("Hello", ignore)
        assert alone.completion == reply.completion


def test_a_model_that_ends_early_does_not_end_the_others(models):
    policy = models.models[0].policy
    first = next(Conversation(models, seed=3).ask("Hello", ignore)).completion
    short = copy(policy)
    short.sampling = replace(policy.sampling, max_new_tokens=2)
    early, late = Conversation(ChatModels((replace(models.models[0], policy=short), models.models[1])), seed=3).ask(
        "Hello", ignore
    )
    assert (early.completion.ids, early.completion.finished) == (first.ids[:2], False)
    assert late.completion.ids == first.ids


def test_an_interrupted_turn_leaves_the_models_as_they_were(models):
    def stop(name, text):
        raise KeyboardInterrupt

    conversation = Conversation(models, seed=5)
    with pytest.raises(KeyboardInterrupt):
        list(conversation.ask("Hello", stop))
    assert torch.is_grad_enabled()
    assert not conversation.turn_to_json()["replies"]
    expected = [reply.completion for reply in Conversation(models, seed=5).ask("Hello", ignore)]
    assert [reply.completion for reply in conversation.ask("Hello", ignore)] == expected


def test_other_replies_that_are_interrupted_leave_the_first_ones(models):
    def stop(name, text):
        raise KeyboardInterrupt

    conversation = Conversation(models)
    texts = [reply.completion.text for reply in conversation.ask("Hello", ignore)]
    with pytest.raises(KeyboardInterrupt):
        list(conversation.again(stop))
    assert conversation.prefer([["sft"], ["ppo"]]).completions == tuple(texts)
    list(conversation.ask("And then?", ignore))
    assert conversation.history == [("Hello", texts[0])]


def test_a_stream_can_be_closed_and_begun_again(tiny_llama):
    (model,) = find_models([str(tiny_llama)], only=(), sampling=SHORT).models
    drawn = stream(model.policy, Request([5, 6, 7], seed=1))
    parts = [next(drawn), next(drawn)]
    drawn.close()
    assert [len(part.ids) for part in parts] == [1, 2]
    assert not any(part.finished for part in parts)
    assert list(stream(model.policy, Request([5, 6, 7], seed=1)))[:2] == parts


@pytest.mark.parametrize("best", ["sft", "ppo", None])
def test_the_conversation_goes_on_with_the_preferred_answer_else_the_last(models, tiny_llama, best):
    hot = find_models([str(tiny_llama)], only=(), sampling=SHORT.model_copy(update={"temperature": 3.0})).models[0]
    conversation = Conversation(ChatModels((models.models[0], replace(hot, name="ppo"))), system="Be brief.")
    texts = {reply.model: reply.completion.text for reply in conversation.ask("one", ignore)}
    assert texts["sft"] != texts["ppo"]
    if best is not None:
        ranking = conversation.prefer([[best], [name for name in texts if name != best]])
        assert ranking.completions[0] == texts[best]
        assert ranking.tiers == ((0,), (1,))
        assert ranking.prompt == (Message("system", "Be brief."), Message("user", "one"))
    list(conversation.ask("two", ignore))
    turns = conversation.turn_to_json()["prompt"]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    assert turns[2]["content"] == texts[best or "ppo"]
    conversation.start_over()
    list(conversation.ask("three", ignore))
    assert [turn["content"] for turn in conversation.turn_to_json()["prompt"]] == ["Be brief.", "three"]


@pytest.mark.parametrize(
    ("tiers", "said"),
    [([["sft"]], "at least two"), ([["sft"], ["sft"]], "at least two"), ([["sft"], ["gpt"]], "`gpt` did not reply")],
)
def test_an_order_that_is_none_is_refused(models, tiers, said):
    conversation = Conversation(models)
    list(conversation.ask("one", ignore))
    with pytest.raises(DataError, match=said) as caught:
        conversation.prefer(tiers)
    assert "sft, ppo" in (caught.value.hint or "")


def test_the_earliest_turns_are_forgotten_when_the_context_is_full(models):
    """256 positions, one byte per token: two turns of 60 fit beside the new one, three do not."""
    conversation = Conversation(models)
    for number in range(4):
        list(conversation.ask(f"{number}" * 50, ignore))
    assert conversation.forgotten >= 1
    first = conversation.turn_to_json()["prompt"][0]
    assert first["content"] != "0" * 50
    with pytest.raises(DataError, match="the prompt has 3") as caught:
        list(conversation.ask("x" * 300, ignore))
    assert "--max-new-tokens" in (caught.value.hint or "")


def test_labels_are_rankings_that_train_rm_reads(models, tmp_path):
    conversation = Conversation(models, system="Be brief.")
    list(conversation.ask("one", ignore))
    files = ChatFiles.of(tmp_path / "run", None)
    path = files.add_ranking(conversation.prefer([["ppo", "sft"]]))
    files.add_turn(conversation.turn_to_json())
    (record,) = read_records(str(path), "ranking").records
    assert record.tiers == ((0, 1),)
    assert record.prompt == (Message("system", "Be brief."), Message("user", "one"))
    turn = json.loads(files.transcript.read_text())
    assert turn["replies"][1] | {"text": "", "tokens": 0, "finished": None, "kl_nats": 0} == {
        "model": "ppo", "text": "", "tokens": 0, "finished": None, "reward": None, "kl_nats": 0, "kl_to": "sft",
    }  # fmt: skip


def test_a_policy_of_a_step_is_not_called_by_its_number(tiny_llama, tmp_path):
    folder = tmp_path / "runs" / "mine" / "ppo" / "steps" / "4"
    shutil.copytree(tiny_llama, folder)
    (folder.parents[1] / "manifest.json").write_text("{}")
    (model,) = find_models([str(folder)], only=(), sampling=SHORT).models
    assert model.name == "mine/ppo/steps/4"


def test_models_are_chosen_by_name(tiny_llama, tiny_gpt2, tmp_path):
    found = find_models([str(tiny_llama), str(tiny_gpt2)], only=(), sampling=SHORT)
    assert [model.name for model in found.models] == [tiny_llama.name, tiny_gpt2.name]
    assert not Conversation(found).keeps_history, "the second has no chat template"
    with pytest.raises(UsageError, match="no model `other`") as caught:
        find_models([str(tiny_llama)], only=["other"], sampling=SHORT)
    assert tiny_llama.name in (caught.value.hint or "")


def test_models_are_loaded_before_the_first_question(models, monkeypatch):
    scores = SimpleNamespace(score=lambda prompts, completions: [0.5])
    loaded_by = []
    monkeypatch.setattr(ChatModels, "load_reward_model", lambda _: loaded_by.append(thread()) or scores)
    used = users_of_weights(monkeypatch)
    conversation = Conversation(replace(models, reward=models.models[0].policy.source))
    with conversation.loading_models():
        replies = list(conversation.ask("Hello", ignore))
    assert used[:3] == ["loading", "loading", "MainThread"], "one after the other, beside the person's thread"
    assert loaded_by == ["loading"]
    assert [reply.reward for reply in replies] == [0.5, 0.5]


@pytest.mark.parametrize("fails", [1, 2])
def test_a_load_that_fails_is_tried_again_where_its_error_is_seen(models, monkeypatch, fails):
    used = users_of_weights(monkeypatch, fails=fails)
    conversation = Conversation(ChatModels(models.models[:1]))
    with conversation.loading_models():
        if fails == 2:
            with pytest.raises(DataError, match="no memory"):
                list(conversation.ask("Hello", ignore))
        assert len(list(conversation.ask("Hello", ignore))) == 1
    assert used[:2] == ["loading", "MainThread"]


def test_a_load_that_panics_is_not_waited_for_forever():
    def panic() -> None:
        raise BaseException("panic in Rust")

    loaded = threading.Event()
    loading = BackgroundLoading([("base", panic), ("ppo", loaded.set)])
    waiting = threading.Thread(target=loading.wait, daemon=True)
    waiting.start()
    waiting.join(10)
    assert not waiting.is_alive()
    assert loaded.is_set()


def test_a_chat_that_ends_loads_no_more():
    """It does not wait for what is being loaded, in a thread that does not keep the process."""
    begun, is_open = threading.Event(), threading.Event()
    loaded, threads = [], []

    def load(name: str) -> None:
        threads.append(threading.current_thread())
        begun.set()
        is_open.wait()
        loaded.append(name)

    loading = BackgroundLoading([(name, partial(load, name)) for name in ("base", "ppo")])
    begun.wait()
    loading.close()
    assert loaded == []
    assert threads[0].daemon
    is_open.set()
    loading.wait()
    assert loaded == ["base"], "it was being loaded"


def test_bases_of_adapters_are_looked_for_before_the_first_line(tmp_path, tiny_llama, models):
    policy, reward = tmp_path / "ppo", tmp_path / "train-rm"
    policy.mkdir()
    reward.mkdir()
    (policy / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tiny_llama)})
    )
    fields = {"base_revision": None, "template": None, "mean": 0.0, "std": 1.0, "hidden_size": 8}
    (reward / "reward.json").write_text(
        json.dumps({"format": 1, "kind": "decoder", "adapter": True, "base": "../ppo", **fields})
    )
    source = models.models[0].policy.source
    tuned = replace(models.models[0], policy=SimpleNamespace(source=source.at(str(policy))))
    found = ChatModels((tuned,), reward=source.at(str(reward))).sources
    assert [one.folder.resolve() for one in found] == [policy, tiny_llama, reward, policy, tiny_llama]


def thread() -> str:
    return threading.current_thread().name


def users_of_weights(monkeypatch, *, fails: int = 0) -> list[str]:
    """The threads that ask for weights, in order; the first of them fail."""
    used: list[str] = []
    whole = Policy.model

    def model(self):
        used.append(thread())
        if len(used) <= fails:
            raise DataError("no memory")
        return whole(self)

    monkeypatch.setattr(Policy, "model", model)
    return used
