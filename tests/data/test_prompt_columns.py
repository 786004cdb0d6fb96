"""Structure in cells, the columns that belong to a prompt, and what a file marks as bad: used, counted or refused."""

# ruff: noqa: E501  (tables of cases: a case a line)

from __future__ import annotations

import json

import pytest

from rlhf_cli.data.records import Demonstration, Message, PromptRecord, Ranking
from rlhf_cli.data.sources import read_records
from rlhf_cli.errors import DataError

PAIR = ((0,), (1,))
USER, REPLY = Message("user", "q"), Message("assistant", "a")
SYSTEM = Message("system", "s")
user, reply, other = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
HH = "\n\nHuman: hi\n\nAssistant:"


@pytest.fixture
def read(write):
    return lambda kind, *rows, **options: read_records(write("a.jsonl", list(rows)), kind, **options)


@pytest.mark.parametrize(
    ("kind", "row", "record"),
    [
        pytest.param("ranking", {"chosen": json.dumps([user, reply]), "rejected": json.dumps([user, other])},
                     Ranking((USER,), ("a", "b"), PAIR), id="whole conversations as JSON text"),
        pytest.param("ranking", {"prompt": json.dumps([user]), "chosen": json.dumps([reply]), "rejected": json.dumps(other)},
                     Ranking((USER,), ("a", "b"), PAIR), id="parts as JSON text, one without a list"),
        pytest.param("ranking", {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
                     Ranking((USER,), ("a", "b"), PAIR), id="ShareGPT beside single messages"),
        pytest.param("demonstration", {"messages": json.dumps([user, reply])}, Demonstration((USER,), "a"), id="messages as JSON text"),
        pytest.param("demonstration", {"prompt": "p", "completion": '[{"a": 1}]'}, Demonstration("p", '[{"a": 1}]'), id="other JSON is text"),
        pytest.param("demonstration", {"prompt": "p", "completion": "{'a': 1}"}, Demonstration("p", "{'a': 1}"), id="other Python is text"),
        pytest.param("demonstration", {"instruction": "i", "input": "x", "output": "o"}, Demonstration("i\n\nx", "o"), id="Alpaca"),
        pytest.param("demonstration", {"instruction": "i", "input": " ", "output": "o"}, Demonstration("i", "o"), id="Alpaca, no input"),
        pytest.param("demonstration", {"instruction": "i", "context": "x", "response": "o"}, Demonstration("i\n\nx", "o"), id="Dolly"),
        pytest.param("demonstration", {"instruction": "i", "input": "", "output": "o", "system": "s", "history": [["q", "a"]]},
                     Demonstration((SYSTEM, USER, REPLY, Message("user", "i")), "o"), id="Alpaca, system, history"),
        pytest.param("demonstration", {"instruction": "i", "output": "o", "history": '[["q", "a"]]'},
                     Demonstration((USER, REPLY, Message("user", "i")), "o"), id="history as JSON text"),
        pytest.param("prompt", {"instruction": "i", "input": "x", "output": "o"}, PromptRecord("i\n\nx"), id="the prompt of Alpaca"),
        pytest.param("demonstration", {"system": "s", "messages": [user, reply]}, Demonstration((SYSTEM, USER), "a"), id="system beside messages"),
        pytest.param("demonstration", {"system": "s", "messages": [{"role": "system", "content": "s"}, user, reply]},
                     Demonstration((SYSTEM, USER), "a"), id="the same system twice"),
        pytest.param("demonstration", {"system": "", "prompt": "q", "completion": "a"}, Demonstration((USER,), "a"), id="an empty system: messages, as in the other rows"),
        pytest.param("demonstration", {"system": None, "conversations": [user, reply]}, Demonstration((USER,), "a"), id="system null"),
        pytest.param("ranking", {"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"}, Ranking((SYSTEM, USER), ("a", "b"), PAIR), id="system beside a pair"),
        pytest.param("ranking", {"system_prompt": "s", "question": "q", "chosen": "a", "rejected": "b"}, Ranking((SYSTEM, USER), ("a", "b"), PAIR), id="question, not the common beginning"),
        pytest.param("ranking", {"instruction": "i", "input": "x", "chosen": "a", "rejected": "b"}, Ranking("i\n\nx", ("a", "b"), PAIR), id="a pair of Alpaca"),
        pytest.param("ranking", {"system": "s", "chosen": [user, reply], "rejected": [user, other]}, Ranking((SYSTEM, USER), ("a", "b"), PAIR), id="system beside whole conversations"),
        pytest.param("ranking", {"input": "x", "chosen": HH + " a", "rejected": HH + " b"}, Ranking(HH, (" a", " b"), PAIR), id="a transcript has its prompt"),
        pytest.param("demonstration", {"messages": [{"role": "human", "value": "q"}, {"from": "model", "content": "a"}]}, Demonstration((USER,), "a"), id="mixed names in a message"),
        pytest.param("demonstration", {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"text": "!"}]}]},
                     Demonstration((USER,), "a!"), id="content in parts"),
        pytest.param("demonstration", {"messages": [user, reply, user, other | {"weight": 0}]}, Demonstration((USER,), "a"), id="the last turn has weight 0"),
    ],
)  # fmt: skip
def test_all_of_a_prompt_is_read(read, kind, row, record):
    assert read(kind, row).records == [record]


NOTATION = str([user, reply])
HARD = {"role": "assistant", "content": "it's \"x\"}\n {'role': 'user'}, {\\d} […]"}


@pytest.mark.parametrize(
    ("kind", "row", "record"),
    [
        pytest.param("ranking", {"chosen": NOTATION, "rejected": str([user, other])}, Ranking((USER,), ("a", "b"), PAIR), id="whole conversations"),
        pytest.param("ranking", {"prompt": str([user]), "chosen": str([reply]), "rejected": str([other])}, Ranking((USER,), ("a", "b"), PAIR), id="prompt and completions"),
        pytest.param("demonstration", {"messages": NOTATION}, Demonstration((USER,), "a"), id="messages"),
        pytest.param("demonstration", {"messages": f"[{user}\n {reply}]"}, Demonstration((USER,), "a"), id="an array of Parquet"),
        pytest.param("demonstration", {"messages": f"[{user} {reply}]"}, Demonstration((USER,), "a"), id="a short array"),
        pytest.param("demonstration", {"messages": str([user, HARD])}, Demonstration((USER,), HARD["content"]), id="quotes and braces"),
        pytest.param("demonstration", {"messages": f"[{user}\n {HARD}]"}, Demonstration((USER,), HARD["content"]), id="quotes and braces, an array"),
    ],
)  # fmt: skip
def test_messages_that_pandas_printed_are_read(read, kind, row, record):
    assert read(kind, row).records == [record]


@pytest.mark.parametrize(
    ("kind", "row", "pieces", "hint"),
    [
        pytest.param("ranking", {"chosen": NOTATION[:-5], "rejected": str([user, other])}, ["Python's notation"], "to_json", id="printed, cut off"),
        pytest.param("demonstration", {"messages": f"[{user}, ..., {reply}]"}, ["`messages`", "Python's notation"], "to_json", id="a long array, shortened"),
        pytest.param("demonstration", {"messages": f"[{user}, {{'role': 'assistant', 'content': 'a' 'b'}}]"}, ["Python's notation"], "to_json", id="not what Python prints"),
        pytest.param("demonstration", {"text": f"array([{reply}], dtype=object)"}, ["Python's notation"], "to_json", id="numpy"),
        pytest.param("ranking", {"chosen": json.dumps([user, reply])[:-5], "rejected": json.dumps([user, other])}, ["cut off?"], "32,767", id="cut by a spreadsheet"),
        pytest.param("demonstration", {"system": "s", "messages": [{"role": "system", "content": "t"}, user, reply]}, ["given twice"], "keep one", id="two system messages"),
        pytest.param("demonstration", {"system": "s", "system_prompt": "t", "prompt": "q", "completion": "a"}, ["`system`, `system_prompt`"], "keep one", id="two system columns"),
        pytest.param("ranking", {"question": "q", "context": "c", "chosen": "a", "rejected": "b"}, ["`question`, `context` could be it"], "{prompt: [context, question]}", id="two columns for the prompt"),
        pytest.param("demonstration", {"messages": [user, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}, reply]}, ["tool calls"], "", id="tool calls"),
        pytest.param("demonstration", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, reply]}, ["images"], "", id="an image in a message"),
        pytest.param("demonstration", {"prompt": "p", "completion": "c", "images": ["x.png"]}, ["images"], "", id="images"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(read, kind, row, pieces, hint):
    with pytest.raises(DataError) as caught:
        read(kind, row)
    for piece in pieces:
        assert piece in caught.value.message
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("kind", "row", "line"),
    [
        (
            "demonstration",
            {"prompt": "p", "completion": "c", "label": False},
            "1 demonstration skipped: marked as bad by its `label`",
        ),
        (
            "demonstration",
            {"prompt": "p", "completion": "c", "label": "0"},
            "1 demonstration skipped: marked as bad by its `label`",
        ),
        (
            "demonstration",
            {"messages": [user, reply | {"weight": 0}]},
            "1 demonstration skipped: no assistant turn is to be trained",
        ),
        (
            "demonstration",
            {"text": "t", "answer": "reject", "_task_hash": 1},
            "1 record skipped: not accepted by its annotator",
        ),
    ],
)
def test_what_is_marked_as_bad_is_skipped_and_is_not_an_error(read, kind, row, line):
    good = {"messages": [user, reply]} if "messages" in row else {"prompt": "p", "completion": "c", "label": True}
    if "text" in row:
        good = {"text": "t", "answer": "accept", "_task_hash": 2}
    loaded = read(kind, good, row)
    assert (len(loaded.records), loaded.total) == (1, 1)
    assert line in loaded.warnings[-1]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"prompt": "p", "completion": "c", "input": "x"}, "`input`, which is not read, in 1 record"),
        ({"prompt": "p", "completion": "c", "context": "x"}, "`context`, which is not read, in 1 record"),
        ({"messages": [user, reply], "tools": [{"a": 1}]}, "`tools`, which is not read, in 1 record"),
        ({"prompt": "p", "completion": "c", "history": "once"}, "`history`, which is not read, in 1 record"),
        ({"text": "t", "system": "s"}, "`system`, which is not read, in 1 record"),
        ({"messages": [user, reply | {"weight": 0}, user, other]}, "earlier turns with `weight: 0`"),
        ({"instruction": "i", "input": "x", "output": "o"}, "read as Alpaca: `instruction`, `input`, in 1 record"),
    ],
)
def test_what_is_not_read_is_counted_and_named(read, row, line):
    [warning] = read("demonstration", row).warnings
    assert line in warning


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completion": "c", "input": "", "context": None, "tools": [], "history": "[]"},
        {"prompt": "p", "completion": "c", "label": True, "rating": 0},
    ],
)
def test_empty_columns_bring_no_warning(read, row):
    assert read("demonstration", row).warnings == []


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("demonstration", {"question": "q", "context": "x", "answer": "a"}),
        ("ranking", {"question": "q", "context": "x", "chosen": "a", "rejected": "b"}),
        ("ranking", {"query": "q", "input": "x", "chosen": "a", "rejected": "b"}),
        ("demonstration", {" Question": "x\n\nq", "Response ": "a"}),
    ],
)
def test_a_hint_loses_nothing_of_the_prompt_and_works(read, kind, row):
    from rlhf_cli.recipe.loader import load_recipe

    with pytest.raises(DataError) as caught:
        read(kind, row)
    setting = str(caught.value.hint).partition("--set '")[2].partition("'")[0]
    columns = load_recipe(None, [setting], []).recipe.data.columns
    loaded = read(kind, row, columns=columns)
    assert loaded.records[0].prompt == "x\n\nq"
    assert loaded.warnings == []


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [user], "chosen": [reply], "rejected": [other]},
        {"chosen": [user, reply], "rejected": [user, other]},
        {"question": "q", "chosen": "a", "rejected": "b"},
    ],
)
def test_the_hint_to_train_on_the_chosen_completions_works(read, row):
    from rlhf_cli.recipe.loader import load_recipe

    with pytest.raises(DataError) as caught:
        read("demonstration", row)
    setting = str(caught.value.hint).rpartition("--set '")[2].partition("'")[0]
    columns = load_recipe(None, [setting], []).recipe.data.columns
    [record] = read("demonstration", row, columns=columns).records
    assert record.completion == "a"


def test_one_bad_value_ends_no_file_that_may_skip_it(write):
    rows = [{"prompt": "p", "completion": "c"}] * 99
    source = write("a.jsonl", [*rows, {"prompt": "p", "completion": None}])
    loaded = read_records(source, "demonstration")
    assert (len(loaded.records), loaded.skips.counts) == (99, {"invalid record": 1})
    [line] = loaded.skips.warnings(loaded.total, source)
    assert "`completion` is null" in line
    [skip] = loaded.skips
    assert skip.to_json()["error"].startswith(f"{source}:100: `completion` is null")
    with pytest.raises(DataError, match=r"a\.jsonl:100: `completion` is null") as caught:
        read_records(source, "demonstration", max_skip=0.0)
    assert caught.value.hint
    two = write("a.jsonl", [*rows, {"prompt": 1, "completion": "c"}, {"prompt": "p", "completion": ""}])
    with pytest.raises(DataError, match=r"a\.jsonl:100: `prompt` is 1.*; 2 of 101 records would be skipped"):
        read_records(two, "demonstration")


def test_a_file_of_another_kind_ends_early(write):
    from rlhf_cli.data.sources import iter_records

    source, seen = write("a.jsonl", [{"question": 1}] * 5_000), []
    with pytest.raises(DataError, match=r"a\.jsonl:1000: "):
        list(iter_records(source, "demonstration", on_skip=seen.append))
    assert len(seen) == 999


def test_weight_0_keeps_a_turn_out_of_training(write):
    turns = [user, reply | {"weight": 0}, user, other]
    [record] = read_records(write("a.jsonl", [{"messages": turns}]), "demonstration").records
    assert [message.is_trained for message in record.prompt] == [True, False, True]
