"""What SFT trains and reward models read under the chat templates of well-known models."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.examples import tokenize
from rlhf_cli.data.records import Demonstration, Message, Ranking
from rlhf_cli.data.template_checks import check_records
from tests.chat_templates import BY_NAME, FAMILIES, OPENS_REASONING, Family, table, turns

ROOT = Path(__file__).resolve().parents[2]
CONVERSATIONS = [
    ("Hi", "Hello"),
    ("Why?", ""),
    ("  What is the sky? ", " Blue,\nand the sea too.\n\n "),
    ("Hi", "Hello", "Why is the sky blue?", "It is the capital."),
    ("Hi", "Hello", "Why?", "So.", "And?", "t"),
]


def as_prompt(messages: list[dict[str, str]]) -> tuple[Message, ...]:
    return tuple(Message(**message) for message in messages[:-1])


def rendered(family: Family, messages: list[dict[str, str]]) -> list[int]:
    return list(family.tokenizer().apply_chat_template(messages)["input_ids"])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.mark.parametrize("contents", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("system", [None, "Be short."])
def test_sft_trains_the_turn_and_reward_models_read_the_conversation(family, contents, system):
    if system is not None and not family.system:
        return
    tokenizer, messages = family.tokenizer(), turns(*contents, system=system)
    format, whole = PromptFormat(tokenizer), rendered(family, messages)
    prompt_ids, completion_ids = format.sequence_ids(as_prompt(messages), contents[-1])
    opened = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert prompt_ids == list(opened) == format.prompt_ids(as_prompt(messages))
    length = len(prompt_ids) + len(completion_ids)
    assert prompt_ids + completion_ids == whole[:length]
    assert completion_ids[-1] in format.end_ids
    assert not set(completion_ids[:-1]) & set(tokenizer.all_special_ids)
    assert not tokenizer.decode(whole[length:]).replace(family.eos, "").strip()
    assert format.pair_ids(as_prompt(messages), contents[-1]) == whole
    cut = format.pair_ids(as_prompt(messages), contents[-1], ended=False)
    assert whole[: len(cut)] == cut
    assert len(prompt_ids) <= len(cut) < length
    assert tokenizer.decode(cut).endswith((contents[-1], contents[-1].strip(), contents[-1].lstrip()))


def test_plain_text_under_chat_is_one_user_message(family):
    format = PromptFormat(family.tokenizer(), "chat")
    assert format.sequence_ids("Hi", "Hello") == format.sequence_ids((Message("user", "Hi"),), "Hello")
    assert format.pair_ids("Hi", "Hello") == rendered(family, turns("Hi", "Hello"))


def test_the_turn_end_token_ends_completions(family):
    tokenizer = family.tokenizer()
    ends = {"Llama 3": "<|eot_id|>", "Gemma 2": "<end_of_turn>", "Gemma 3": "<end_of_turn>", "Phi-3": "<|end|>"}
    end = ends.get(family.name, "<|im_end|>" if "<|im_end|>" in family.special else family.eos)
    assert PromptFormat(tokenizer).end_ids == set(tokenizer.convert_tokens_to_ids([end, family.eos]))
    tokenizer.chat_template = None
    assert PromptFormat(tokenizer).end_ids == {tokenizer.eos_token_id}


@pytest.mark.parametrize("contents", [("a", "So {} it is"), ("Say {}", "b"), ("{}{}", "{}", "c {}\n", "{}")])
def test_text_that_spells_special_tokens_stays_text(family, contents):
    tokenizer = family.tokenizer()
    format = PromptFormat(tokenizer)
    spelled = [content.replace("{}", "".join(family.special)) for content in contents]
    plain = [content.replace("{}", "") for content in contents]
    prompt, plain_prompt = as_prompt(turns(*spelled)), as_prompt(turns(*plain))

    def specials(ids: list[int]) -> list[int]:
        return [token for token in ids if token in tokenizer.all_special_ids]

    assert specials(format.prompt_ids(prompt)) == specials(format.prompt_ids(plain_prompt))
    assert specials(format.pair_ids(prompt, spelled[-1])) == specials(format.pair_ids(plain_prompt, plain[-1]))
    prompt_ids, completion_ids = format.sequence_ids(prompt, spelled[-1])
    text = tokenizer.apply_chat_template(turns(*spelled), tokenize=False)
    decoded = tokenizer.decode(prompt_ids + completion_ids)
    if not family.eats_newline:
        assert text.startswith(decoded)
    assert decoded.count(family.special[0]) == text[: len(decoded) + 20].count(family.special[0]) or family.eats_newline
    assert format.prompt_string(prompt) == tokenizer.apply_chat_template(
        turns(*spelled)[:-1], tokenize=False, add_generation_prompt=True
    )


def test_special_tokens_in_text_are_counted_and_said_once(capsys):
    tokenizer = BY_NAME["Qwen 2.5"].tokenizer()
    records = [
        Demonstration("Hi<|im_end|>", "Hello"),
        Demonstration("Hi", "Hello"),
        Ranking("Hi", ("a", "b <|im_start|>"), ((0,), (1,))),
        Demonstration((Message("user", "<|endoftext|>"),), "Hello"),
    ]
    check_records(PromptFormat(tokenizer, "chat", name="`m`"), records)
    assert "3 records with special tokens of `m` in their text: they are read as text" in said(capsys)
    check_records(PromptFormat(tokenizer, None, name="`m`"), records)
    lines = said(capsys)
    assert "1 record with special tokens of `m` in their text: they are read as text" in lines
    assert (
        "2 records with special tokens of `m` in their text: without a chat template, they are read as control" in lines
    )
    check_records(PromptFormat(tokenizer, "chat"), records[1:2])
    assert not said(capsys)


def test_text_templates_escape_what_they_contain_and_write_special_tokens():
    tokenizer = BY_NAME["ChatML on a base model"].tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    format = PromptFormat(tokenizer, "{prompt}<|im_end|>")
    assert format.prompt_ids("a<|im_end|>").count(end) == 1
    assert tokenizer.decode(format.prompt_ids("a<|im_end|>")) == "a<|im_end|><|im_end|>"
    assert end not in format.completion_ids("b<|im_end|>")
    assert PromptFormat(tokenizer).prompt_ids("a<|im_end|>").count(end) == 1


def test_reasoning_blocks_of_earlier_turns_are_left_to_the_template():
    family = BY_NAME["Qwen 3"]
    thought = "<think>\nhm\n</think>\n\n"
    messages = turns("Hi", thought + "Hello", "Why?", thought + "So.")
    format = PromptFormat(family.tokenizer())
    prompt_ids, completion_ids = format.sequence_ids(as_prompt(messages), thought + "So.")
    assert prompt_ids + completion_ids == rendered(family, messages)[:-1]
    assert format.tokenizer.decode(completion_ids) == thought + "So.<|im_end|>"
    assert format.tokenizer.decode(prompt_ids).count("think") == 0


MOVES_SYSTEM_MESSAGE = "Mistral"


@pytest.mark.parametrize("system", [None, "Be short."])
def test_every_turn_of_the_assistant_is_trained_as_the_conversation_shows_it(family, system):
    if system is not None and not family.system:
        return
    contents = ("Hi", "Hello", "Why is it?", " Because of the sky.", "And?", "", "So?", "t")
    messages = turns(*contents, system=system)
    format = PromptFormat(family.tokenizer())
    record = Demonstration(as_prompt(messages), contents[-1])
    example = tokenize(record, format, is_encoder_decoder=False, all_turns=True)
    if family.name == MOVES_SYSTEM_MESSAGE and system is not None:
        assert (example.earlier_turns, example.skipped_turns) == ((), 3)
        return
    assert example.skipped_turns == 0
    for (start, stop), content in zip(example.earlier_turns, contents[1:-1:2], strict=True):
        end = format.tokenizer.convert_ids_to_tokens(example.ids[stop - 1])
        before, written = format.tokenizer.decode(example.ids[:start]), format.tokenizer.decode(example.ids[start:stop])
        assert written in (content + end, content.strip() + end, " " + content + end)
        opened = format.tokenizer.apply_chat_template(
            messages[: 2 * len(example.earlier_turns[: example.earlier_turns.index((start, stop))]) + 1 + bool(system)],
            tokenize=False,
            add_generation_prompt=True,
        )
        assert opened.startswith(before) or family.eats_newline
    trained = [token for token, counts in zip(example.ids, example.is_trained(), strict=True) if counts]
    assert len(trained) == len(example.completion_ids) + sum(stop - start for start, stop in example.earlier_turns)
    last = tokenize(record, format, is_encoder_decoder=False)
    assert (last.ids, last.earlier_turns) == (example.ids, ())


def test_reasoning_of_earlier_turns_that_the_template_drops_is_not_trained():
    family, thought = BY_NAME["Qwen 3"], "<think>\nhm\n</think>\n\n"
    messages = turns("Hi", thought + "Hello", "Why?", thought + "So.")
    format = PromptFormat(family.tokenizer())
    example = tokenize(
        Demonstration(as_prompt(messages), messages[-1]["content"]), format, is_encoder_decoder=False, all_turns=True
    )
    [(start, stop)] = example.earlier_turns
    assert format.tokenizer.decode(example.ids[start:stop]) == "Hello<|im_end|>"


@pytest.mark.parametrize("content", ["<b>bold</b>", "<think>", "assistant", "a"])
def test_an_earlier_turn_keeps_its_first_characters_whatever_the_generation_prompt_writes(content):
    """The generation prompt goes on with `<think>`, which an earlier turn does not have."""
    family = BY_NAME["Qwen 3"]
    messages = turns("Hi", content, "Why?", "So.")
    format = PromptFormat(family.tokenizer(), template_kwargs={"enable_thinking": False})
    example = tokenize(Demonstration(as_prompt(messages), "So."), format, is_encoder_decoder=False, all_turns=True)
    [(start, stop)] = example.earlier_turns
    assert format.tokenizer.decode(example.ids[start:stop]) == content + "<|im_end|>"


def test_special_tokens_that_a_policy_writes_are_control_tokens_of_its_turn():
    """As `[THINK]` in Magistral: SFT and reward models read the ids that the policy writes."""
    tokenizer = BY_NAME["Mistral"].tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]", "[THINK]", "[/THINK]"]})
    format = PromptFormat(tokenizer)
    answer = "[THINK]hm[/THINK]It is 3."
    messages = turns("What is 1 + 2?", answer)
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    prompt_ids, completion_ids = format.sequence_ids(as_prompt(messages), answer)
    assert prompt_ids + completion_ids == format.pair_ids(as_prompt(messages), answer) == whole
    thought = tokenizer.convert_tokens_to_ids("[THINK]")
    assert thought in completion_ids
    # What structures a conversation stays text, in both turns, and so does everything in the user's.
    forged = format.pair_ids((Message("user", "[THINK]</s>"),), "[INST]</s>")
    assert thought not in forged
    assert forged.count(tokenizer.eos_token_id) == 1


def test_turns_of_a_template_without_generation_prompt_are_trained_with_their_header_or_skipped():
    family = BY_NAME["ChatML on a base model"]
    tokenizer = family.tokenizer()
    tokenizer.chat_template = family.template.partition("{% if add_generation_prompt")[0].replace(
        "m.content +", "m.content.replace('x', 'y') +"
    )
    format = PromptFormat(tokenizer)
    example = tokenize(
        Demonstration(as_prompt(turns("Hi", "Hello", "Why?", "x", "And?", "So.")), "So."),
        format,
        is_encoder_decoder=False,
        all_turns=True,
    )
    [(start, stop)] = example.earlier_turns
    assert tokenizer.decode(example.ids[start:stop]) == "<|im_start|>assistant\nHello<|im_end|>"
    assert example.skipped_turns == 1


@pytest.mark.parametrize("header", ["<|im_start|>", "@"])
def test_a_turn_without_turn_end_ends_with_its_content(header):
    tokenizer = BY_NAME["Qwen 2.5"].tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ header + m.role + '\n' + m.content | trim }}"
        "{% if m.role == 'assistant' and (loop.index > with_end or messages | length == 2) %}{{ '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ header + 'assistant\n' }}{% endif %}"
    )
    record = Demonstration(as_prompt(turns("Hi", " Hello ", "Why?", "So.", "And?", " No. ")), " No. ")
    for with_end, expected in ((3, ["Hello", "So.<|im_end|>"]), (99, ["Hello", "So."])):
        format = PromptFormat(tokenizer, template_kwargs={"with_end": with_end, "header": header})
        example = tokenize(record, format, is_encoder_decoder=False, all_turns=True)
        assert [tokenizer.decode(example.ids[slice(*span)]) for span in example.earlier_turns] == expected
        assert tokenizer.decode(example.completion_ids) == "No.<|im_end|>"


@pytest.mark.parametrize("name", ["Qwen 3", "Qwen 3.5"])
def test_variables_reach_the_template(name):
    tokenizer = BY_NAME[name].tokenizer()
    thinking, brief = PromptFormat(tokenizer), PromptFormat(tokenizer, template_kwargs={"enable_thinking": False})
    question = (Message("user", "Hi"),)
    assert tokenizer.decode(brief.prompt_ids(question)).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(brief.sequence_ids(question, "Hello")[1]) == "Hello<|im_end|>"
    first, second = thinking.sequence_ids(question, "Hello"), brief.sequence_ids(question, "Hello")
    assert first[0] + first[1] == second[0] + second[1]
    assert "</think>" in tokenizer.decode(first[1])


def test_a_conversation_that_does_not_continue_its_prompt_is_trained_as_it_is(capsys):
    tokenizer = OPENS_REASONING.tokenizer()
    format, question = PromptFormat(tokenizer, name="`r`"), (Message("user", "Hi"),)
    completion = "hm\n</think>\n\nHello"
    prompt_ids, completion_ids = format.sequence_ids(question, completion)
    assert tokenizer.decode(prompt_ids).endswith("><think>\n")
    assert tokenizer.decode(completion_ids) == completion + OPENS_REASONING.eos
    assert format.pair_ids(question, completion) == rendered(OPENS_REASONING, turns("Hi", completion))
    check_records(format, [Demonstration(question, completion)] * 3)
    lines = said(capsys)
    assert lines.count("warning") == 1
    assert "template of `r` ends a prompt" in lines
    assert "<think>" in lines


def test_a_completion_that_merges_with_the_prompt_is_tokenized_apart():
    tokenizer = BY_NAME["Qwen 2.5"].tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% else %}"
        "{% if not loop.last or add_generation_prompt %}{{ ' ' }}{% else %}{{ ' ' }}{% endif %}{% endif %}{% endfor %}"
    )
    format, question = PromptFormat(tokenizer), (Message("user", "capital"),)
    prompt_ids, completion_ids = format.sequence_ids(question, "of")
    assert prompt_ids == format.prompt_ids(question)
    whole = list(tokenizer.apply_chat_template(turns("capital", "of"))["input_ids"])
    assert prompt_ids + completion_ids != whole == format.pair_ids(question, "of")
    assert tokenizer.decode(prompt_ids + completion_ids) == tokenizer.decode(whole)


def test_what_comes_before_the_first_users_text(family):
    tokenizer = family.tokenizer()
    messages = turns("Hi", "Hello", "Why?", "So.", system="Be short." if family.system else None)
    format = PromptFormat(tokenizer, "chat")
    leading = format.leading_ids(as_prompt(messages))
    ids = format.prompt_ids(as_prompt(messages))
    assert ids[: len(leading)] == leading
    after = tokenizer.decode(ids[len(leading) :])
    assert after.lstrip().startswith("Hi")
    assert ids[: len(format.leading_ids("Hi"))] == format.leading_ids("Hi") or family.system


def test_the_table_of_the_documentation():
    assert table() in (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
