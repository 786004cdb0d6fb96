"""Replies of several models to the same turns, what is measured of them, and what becomes a label."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rlhf_cli.chat.conversation import Conversation
from rlhf_cli.chat.files import ChatFiles
from rlhf_cli.chat.models import ChatModels, find_models
from rlhf_cli.data.records import Message
from rlhf_cli.data.sources import read_records
from rlhf_cli.errors import DataError, UsageError
from rlhf_cli.generation.generator import Request
from rlhf_cli.generation.torch_generator import TorchGenerator
from rlhf_cli.settings.shared import SamplingSettings

SHORT = SamplingSettings(max_new_tokens=8)


def ignore(model):
    return lambda text: None


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
    (reply,) = conversation.ask("Hello", lambda model: seen.append)
    assert len(seen) == len(reply.completion.ids)
    assert seen[-1].strip("\ufffd") == reply.completion.text.strip("\ufffd")


def test_tokens_are_told_of_the_request_that_they_belong_to(models):
    """Requests are drawn in another order: the longest prompt first."""
    policy, told = models.models[0].policy, {}
    requests = [Request([5, 6], seed=1), Request([5, 6, 7, 8], seed=2)]
    found = TorchGenerator(on_token=lambda number, ids: told.__setitem__(number, list(ids))).generate(policy, requests)
    assert told == {number: completion.ids for number, completion in enumerate(found)}


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


def test_models_are_chosen_by_name(tiny_llama, tiny_gpt2, tmp_path):
    found = find_models([str(tiny_llama), str(tiny_gpt2)], only=(), sampling=SHORT)
    assert [model.name for model in found.models] == [tiny_llama.name, tiny_gpt2.name]
    assert not Conversation(found).keeps_history, "the second has no chat template"
    with pytest.raises(UsageError, match="no model `other`") as caught:
        find_models([str(tiny_llama)], only=["other"], sampling=SHORT)
    assert tiny_llama.name in (caught.value.hint or "")
