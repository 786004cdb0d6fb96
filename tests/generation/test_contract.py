"""The generation contract: what an artifact says of prompts, sampling, stops and splits, and who inherits it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cli.data.records import Demonstration, Message, PromptRecord, split_key
from rlhf_cli.data.splits import Split
from rlhf_cli.errors import ModelError, UsageError
from rlhf_cli.generation.contract import Contract, keys_of, read_contract, split_of
from rlhf_cli.generation.prompts import PromptStyle, prompt_style, text_template
from rlhf_cli.generation.sampling import Sampling
from rlhf_cli.models.loading import ModelSource, load_tokenizer
from rlhf_cli.settings.shared import DataSettings, SamplingSettings, StageSamplingSettings

CONTRACT = Contract(
    "Q: {prompt}\nA:",
    {"enable_thinking": False},
    SamplingSettings(temperature=0.6, max_new_tokens=9, stop_tokens=["?"]),
    Split(0.25, 7),
    True,
    frozenset({"0123456789abcdef", "f" * 16}),
)


def test_a_contract_is_read_as_it_was_written(tmp_path: Path):
    CONTRACT.write(tmp_path)
    assert read_contract(tmp_path) == CONTRACT
    assert read_contract(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps({"format": 1}), "is damaged"),
        (json.dumps({"format": 9}), "format must be 1, got 9"),
    ],
)
def test_a_damaged_contract_is_refused_and_never_passed_over(text: str, message: str, tmp_path: Path):
    (tmp_path / "contract.json").write_text(text)
    with pytest.raises(ModelError, match=message) as caught:
        read_contract(tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("split", {"holdout": float("nan"), "seed": 0}),
        ("split", {"holdout": 1.0, "seed": 0}),
        ("split", {"holdout": 0.1, "seed": -1}),
        ("split", None),
        ("prompt_template", 5),
        ("prompt_template", "no slot"),
        ("template_kwargs", "enable_thinking"),
        ("sampling", {"temperature": 0}),
        ("sampling", {"unknown": 1}),
    ],
)
def test_a_value_that_no_recipe_may_have_is_no_contract(name: str, value: object, tmp_path: Path):
    CONTRACT.write(tmp_path)
    path = tmp_path / "contract.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ModelError, match="is damaged"):
        read_contract(tmp_path)


@pytest.mark.parametrize("content", [None, b"0123456789abcdef\n01234567", b"\xff\xfe"], ids=["absent", "torn", "bytes"])
def test_training_prompts_that_cannot_be_read_are_not_taken_for_none(content: bytes | None, tmp_path: Path):
    CONTRACT.write(tmp_path)
    file = tmp_path / "trained_prompts.txt"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ModelError, match="is damaged"):
        read_contract(tmp_path)


def test_each_value_of_sampling_is_the_first_that_is_set():
    own = StageSamplingSettings(temperature=0.3, batch_size=5)
    shared = SamplingSettings(temperature=0.9, top_p=0.8)
    found = Sampling.resolve(own, shared, CONTRACT.sampling)
    assert found == Sampling(0.3, 0.8, 9, ("?",), 5)
    assert Sampling.resolve(SamplingSettings()) == Sampling() == Sampling(1.0, 1.0, 128, (), 32)
    assert Sampling.resolve(SamplingSettings(stop_tokens=[]), CONTRACT.sampling).stop_tokens == (), "none is a value"
    assert Sampling.resolve(found.settings()) == Sampling(0.3, 0.8, 9, ("?",))


def test_differences_name_what_was_trained_and_say_nothing_of_what_was_not():
    assert list(Sampling(0.6, 0.9, 9, ("?",)).differences(CONTRACT.sampling)) == []
    assert list(Sampling(1.0, 1.0, 12, ()).differences(CONTRACT.sampling)) == [
        "temperature 1 (training: 0.6)",
        "max_new_tokens 12 (training: 9)",
        "stop_tokens none (training: '?')",
    ]


def test_the_split_is_the_recipe_s_then_the_model_s_then_the_default():
    assert split_of(DataSettings(), CONTRACT) == Split(0.25, 7)
    assert split_of(DataSettings(holdout=0.5), None, CONTRACT) == Split(0.5, 7)
    assert split_of(DataSettings(split_seed=3), CONTRACT) == Split(0.25, 3)
    assert split_of(DataSettings(), None) == Split(0.1, 0)


def test_keys_are_of_the_question_and_of_the_text_where_there_is_none():
    conversation = (Message("system", "Be brief."), Message("user", "Why?"))
    assert keys_of([PromptRecord("Why?"), PromptRecord(conversation)]) == {split_key("Why?")}
    assert keys_of([Demonstration("", "A text."), Demonstration("", "Another.")]) == {
        split_key("A text."),
        split_key("Another."),
    }


def style(folder: Path, tokenizer, **settings) -> PromptStyle:
    may_differ = settings.pop("may_differ", False)
    return prompt_style(DataSettings(**settings), str(folder), tokenizer, may_differ=may_differ)


def test_a_model_is_prompted_as_it_was_trained(tiny_llama: Path, tmp_path: Path, capsys):
    tokenizer = load_tokenizer(ModelSource(str(tiny_llama)))
    CONTRACT.write(tmp_path)
    trained = PromptStyle("Q: {prompt}\nA:", {"enable_thinking": False})
    assert style(tmp_path, tokenizer) == trained
    assert style(tmp_path, tokenizer, prompt_template="Q: {prompt}\nA:") == trained
    assert capsys.readouterr().err == ""
    for other in ({"prompt_template": "chat"}, {"prompt_template": None}, {"template_kwargs": {}}):
        with pytest.raises(UsageError, match=r"was trained with prompts as 'Q: \{prompt\}") as caught:
            style(tmp_path, tokenizer, **other)
        assert "remove `data.prompt_template`" in str(caught.value.hint)
        style(tmp_path, tokenizer, may_differ=True, **other)
        assert "was trained with prompts" in capsys.readouterr().err


def test_the_model_of_others_is_prompted_as_its_tokenizer_allows(tiny_llama: Path, tiny_t5: Path, capsys):
    chat, plain = (load_tokenizer(ModelSource(str(folder))) for folder in (tiny_llama, tiny_t5))
    assert style(tiny_llama, chat) == PromptStyle("chat")
    assert "is prompted in its chat template (`data.prompt_template: auto`)" in capsys.readouterr().err
    assert style(tiny_t5, plain) == PromptStyle(None)
    assert "is prompted as plain text" in capsys.readouterr().err
    assert style(tiny_llama, chat, prompt_template=None) == PromptStyle(None), "null is asked for, not a default"
    assert style(tiny_llama, chat, prompt_template="> {prompt}") == PromptStyle("> {prompt}")


def test_a_reward_model_without_a_template_gets_that_of_the_policy(tmp_path: Path):
    CONTRACT.write(tmp_path)
    assert text_template(DataSettings(), str(tmp_path)) == "Q: {prompt}\nA:"
    assert text_template(DataSettings(prompt_template="> {prompt}"), str(tmp_path)) == "> {prompt}"
    assert text_template(DataSettings(), None) is None
