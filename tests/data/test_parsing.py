# ruff: noqa: E501  (tables of cases: a case a line)

from __future__ import annotations

import pytest

from rlhf_cli.data.records import Demonstration, Message, PromptRecord, Ranking
from rlhf_cli.data.sources import read_records
from rlhf_cli.errors import DataError, UsageError

USER, ANSWER, SYSTEM = Message("user", "q"), Message("assistant", "a"), Message("system", "s")
user, answer, system = ({"role": m.role, "content": m.content} for m in (USER, ANSWER, SYSTEM))
other = {"role": "assistant", "content": "b"}
HH = "\n\nHuman: hi\n\nAssistant:"


@pytest.fixture
def read(write):
    return lambda kind, *rows, **options: read_records(
        write("a.jsonl", list(rows)), kind, **({"max_skip": 0.9} | options)
    )


@pytest.mark.parametrize(
    ("kind", "row", "record"),
    [
        pytest.param("demonstration", {"prompt": "p", "completion": " c "}, Demonstration("p", " c "), id="prompt, completion"),
        pytest.param("demonstration", {"messages": [system, user, answer]}, Demonstration((SYSTEM, USER), "a"), id="messages"),
        pytest.param("demonstration", {"messages": [user, other, user, answer]},
                     Demonstration((USER, Message("assistant", "b"), USER), "a"), id="messages: the last answer"),
        pytest.param("demonstration", {"text": "t"}, Demonstration("", "t"), id="text"),
        pytest.param("demonstration", {"prompt": [user], "completion": [answer]}, Demonstration((USER,), "a"), id="both messages"),
        pytest.param("demonstration", {"prompt": [user], "completion": "c"}, Demonstration((USER,), "c"), id="prompt messages"),
        pytest.param("demonstration", {"prompt": "p", "prompt_id": 3, "messages": [user, answer]},
                     Demonstration((USER,), "a"), id="messages beside a prompt"),
        pytest.param("demonstration", {"prompt": "p", "completion": "c", "text": "t", "id": 1}, Demonstration("p", "c"), id="extra fields"),
        pytest.param("prompt", {"prompt": "p"}, PromptRecord("p"), id="prompt"),
        pytest.param("prompt", {"prompt": [system, user]}, PromptRecord((SYSTEM, USER)), id="prompt as messages"),
        pytest.param("prompt", {"messages": [user]}, PromptRecord((USER,)), id="prompt named messages"),
        pytest.param("prompt", {"prompt": "p", "chosen": "a", "rejected": "b"}, PromptRecord("p"), id="prompt of a pair"),
        pytest.param("prompt", {"chosen": HH + " a", "rejected": HH + " b"}, PromptRecord(HH), id="prompt of an HH pair"),
        pytest.param("preference", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2},
                     Ranking("p", ("a", "b"), ((0,), (1,)), 2.0), id="pair"),
        pytest.param("ranking", {"prompt": "p", "chosen": "a", "rejected": "b"}, Ranking("p", ("a", "b"), ((0,), (1,))), id="pair for ranking"),
        pytest.param("preference", {"chosen": HH + " a", "rejected": HH + " b"}, Ranking(HH, (" a", " b"), ((0,), (1,))), id="HH"),
        pytest.param("preference", {"chosen": "The sky is blue.", "rejected": "The sky is black."},
                     Ranking("The sky is", (" blue.", " black."), ((0,), (1,))), id="implicit: the common beginning"),
        pytest.param("preference", {"chosen": "The sky", "rejected": "The sky is"},
                     Ranking("The", (" sky", " sky is"), ((0,), (1,))), id="implicit: one begins the other"),
        pytest.param("preference", {"chosen": [user, answer], "rejected": [user, other]},
                     Ranking((USER,), ("a", "b"), ((0,), (1,))), id="implicit: conversations"),
        pytest.param("preference", {"prompt": [user], "chosen": [answer], "rejected": [other]},
                     Ranking((USER,), ("a", "b"), ((0,), (1,))), id="explicit: conversations"),
        pytest.param("preference", {"prompt": "q", "chosen": [user, answer], "rejected": [user, other]},
                     Ranking((USER,), ("a", "b"), ((0,), (1,))), id="UltraFeedback: prompt beside whole conversations"),
        pytest.param("ranking", {"prompt": "p", "completions": ["a", "b", "c", "b"], "ranking": [[2], [3, 1], [0]], "annotator": 7},
                     Ranking("p", ("a", "b", "c", "b"), ((2,), (3, 1), (0,)), annotator="7"), id="ranking"),
        pytest.param("preference", {"prompt": "p", "completions": ["a", "b"], "ranking": [[1, 0]], "chosen": None, "rejected": None},
                     Ranking("p", ("a", "b"), ((1, 0),)), id="ranking for preference, a tie"),
    ],
)  # fmt: skip
def test_every_format_becomes_the_same_records(read, kind, row, record):
    loaded = read(kind, row)
    assert loaded.records == [record]
    assert loaded.records[0].location.endswith("a.jsonl:1")


@pytest.mark.parametrize(
    ("kind", "row", "pieces"),
    [
        pytest.param("demonstration", {"prompt": 1, "completion": "c"}, ["`prompt` is 1", "a number"], id="prompt a number"),
        pytest.param("demonstration", {"prompt": "p", "completion": None}, ["`completion` is null"], id="null"),
        pytest.param("demonstration", {"prompt": None, "completion": "c"}, ["`prompt` is null"], id="null prompt"),
        pytest.param("demonstration", {"messages": None}, ["`messages` is null"], id="null messages"),
        pytest.param("demonstration", {"text": ["t"]}, ["`text` is", "a list"], id="text a list"),
        pytest.param("demonstration", {"messages": []}, ["`messages` is []"], id="no messages"),
        pytest.param("demonstration", {"messages": "hi"}, ["`messages` is \"hi\""], id="messages a string"),
        pytest.param("demonstration", {"messages": [user, {"role": "assistant"}]}, ["`messages[1]` has no `content`"], id="no content"),
        pytest.param("demonstration", {"messages": [user, {"role": "assistant", "content": None}]},
                     ["`messages[1].content` is null"], id="null content"),
        pytest.param("demonstration", {"messages": [user, "hi"]}, ["`messages[1]` is \"hi\""], id="message a string"),
        pytest.param("demonstration", {"messages": [{"role": "usr", "content": "q"}, answer]},
                     ["`messages[0].role` is \"usr\"", "`user`?"], id="misspelt role"),
        pytest.param("demonstration", {"messages": [answer]}, ["there is no prompt"], id="an answer alone"),
        pytest.param("demonstration", {"prompt": [user], "completion": [answer, user]}, ["assistant, user"], id="completion of two turns"),
        pytest.param("demonstration", {"prompt": "p", "completion": [answer]}, ["mixed"], id="mixed in a row"),
        pytest.param("demonstration", {"prompt": [user, answer], "completion": "c"}, ["ends with an assistant turn"], id="prompt ends with answer"),
        pytest.param("demonstration", {"prompt": "p", "completion": "half \ud83d"}, ["`completion`", "surrogate", "character 6"], id="surrogate"),
        pytest.param("prompt", {"prompt": True}, ["`prompt` is true", "a boolean"], id="prompt a boolean"),
        pytest.param("prompt", {"prompt": []}, ["`prompt` is []"], id="prompt an empty list"),
        pytest.param("preference", {"prompt": "p", "chosen": "a"}, ["`rejected` is missing", "`prompt`, `chosen`"], id="no rejected"),
        pytest.param("preference", {"prompt": "p", "chosen": "a", "rejected": None}, ["`rejected` is null"], id="rejected null"),
        pytest.param("preference", {"prompt": "p", "chosen": "a", "rejected": [other]}, ["mixed"], id="pair mixed"),
        pytest.param("preference", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "2"}, ['`margin` is "2"'], id="margin text"),
        pytest.param("preference", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": True}, ["`margin` is true"], id="margin boolean"),
        pytest.param("ranking", {"prompt": "p", "completions": ["a"], "ranking": [[0]]}, ["at least two"], id="K = 1"),
        pytest.param("ranking", {"prompt": "p", "completions": "ab", "ranking": [[0], [1]]}, ["at least two"], id="completions text"),
        pytest.param("ranking", {"prompt": "p", "completions": ["a", 2], "ranking": [[0], [1]]}, ["`completions[1]` is 2"], id="completion number"),
        pytest.param("ranking", {"prompt": "p", "completions": ["a", "b"], "ranking": [0, 1]}, ["tiers that are lists"], id="flat ranking"),
        pytest.param("ranking", {"prompt": "p", "completions": ["a", "b"], "ranking": [[0], []]}, ["tiers that are lists"], id="empty tier"),
        pytest.param("ranking", {"prompt": "p", "completions": ["a", "b"], "ranking": [[0]]}, ["lacks 1"], id="one skipped"),
        pytest.param("ranking", {"prompt": "p", "completions": ["a", "b"], "ranking": [[0], [0, 1]]}, ["0 more than once"], id="one twice"),
        pytest.param("ranking", {"prompt": "p", "completions": ["a", "b"], "ranking": [[1], [2]]}, ["2, but there are 2"], id="from one"),
        pytest.param("ranking", {"prompt": "p", "completions": ["a", "b"], "ranking": [[0], [-1]]}, ["-1"], id="negative index"),
        pytest.param("ranking", {"prompt": "p", "completions": ["a", "b"], "ranking": [[False], [True]]}, ["false, which is not an index"], id="booleans"),
        pytest.param("ranking", {"prompt": "p", "completions": ["a", "b"]}, ["`ranking` is missing"], id="no ranking"),
        pytest.param("ranking", {"prompt": "p", "chosen": "a", "rejected": "b", "annotator": [1]}, ["`annotator`"], id="annotator a list"),
    ],
)  # fmt: skip
def test_wrong_records_are_refused_with_line_and_value(write, kind, row, pieces):
    from json import dumps

    good = {"prompt": "g", "completion": "g", "chosen": "g", "rejected": "h"}
    source = write("a.jsonl", dumps(good) + "\n" + dumps(row) + "\n")
    for name in ("messages", "text"):
        if row.get(name):  # so that the first record does not make it "mixed"
            source = write("a.jsonl", "\n" + dumps(row) + "\n")
    if isinstance(row.get("prompt"), list):
        source = write("a.jsonl", "\n" + dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        read_records(source, kind)
    assert caught.value.message.startswith(f"{source}:2: ")
    for piece in pieces:
        assert piece in caught.value.message


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("demonstration", {"prompt": "p", "completion": ""}, "empty completion"),
        ("demonstration", {"prompt": "p", "completion": " \n\u3000"}, "completion of white space only"),
        ("demonstration", {"prompt": [user], "completion": [{"role": "assistant", "content": ""}]}, "empty completion"),
        ("demonstration", {"messages": [system, user]}, "no assistant turn"),
        ("preference", {"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen equal to rejected"),
        ("preference", {"chosen": HH + " a", "rejected": HH + " a"}, "chosen equal to rejected"),
        ("preference", {"prompt": "p", "chosen": "a", "rejected": ""}, "empty completion"),
        ("preference", {"chosen": HH + " a", "rejected": HH}, "empty completion"),
        ("preference", {"chosen": HH + " a", "rejected": HH + " b\n\nHuman: c\n\nAssistant: d"}, "differ before the last reply"),
        ("preference", {"chosen": HH + " a", "rejected": "b"}, "differ before the last reply"),
        ("preference", {"chosen": [user, answer], "rejected": [system, user, other]}, "differ before the last reply"),
        ("preference", {"chosen": [user, answer], "rejected": [user, user]}, "no assistant turn"),
        ("preference", {"chosen": HH + " a\n\nHuman: x", "rejected": HH + " b"}, "does not end with a reply"),
        ("preference", {"prompt": "p", "completions": ["a", "a"], "ranking": [[0], [1]]}, "chosen equal to rejected"),
        ("ranking", {"prompt": "p", "completions": ["a", "b", "a"], "ranking": [[0], [1], [2]]}, "same completion in two tiers"),
        ("ranking", {"prompt": "p", "completions": ["a", " "], "ranking": [[0], [1]]}, "white space only"),
    ],
)  # fmt: skip
def test_records_without_a_signal_are_skipped_and_counted(read, kind, row, reason):
    conversational = "messages" in row or isinstance(row.get("chosen", row.get("prompt")), list)
    good = {"demonstration": {"messages": [user, answer]} if conversational else {"prompt": "g", "completion": "h"}}
    pair = (
        {"chosen": [user, answer], "rejected": [user, other]}
        if conversational
        else {"prompt": "g", "chosen": "a", "rejected": "b"}
    )
    loaded = read(kind, good.get(kind, pair), row)
    assert len(loaded.records) == 1
    assert (loaded.skips.total, loaded.total) == (1, 2)
    [skip] = loaded.skips
    assert reason in skip.reason
    assert skip.location.endswith("a.jsonl:2")
    assert skip.excerpt.startswith("{")


@pytest.mark.parametrize(
    ("kind", "rows", "pieces"),
    [
        ("prompt", [{"prompt": "p"}, {"prompt": ""}, {"prompt": "  "}], ["an empty prompt in 2 records", "a.jsonl:2"]),
        ("prompt", [{"messages": [user, answer]}], ["a completion at the end of the prompt", "in 1 record ("]),
        ("demonstration", [{"messages": [answer, user, answer]}], ["order of turns", "begins with the assistant"]),
        ("demonstration", [{"messages": [user, user, answer]}], ["two user turns in a row"]),
        ("demonstration", [{"messages": [user, answer, answer]}], ["two assistant turns in a row"]),
        ("demonstration", [{"messages": [user, answer, user]}], ["turns after the last completion"]),
        ("preference", [{"chosen": "x a", "rejected": "x b"}], ["common beginning"]),
    ],
)  # fmt: skip
def test_warnings_name_the_kind_and_count(read, kind, rows, pieces):
    [warning] = read(kind, *rows).warnings
    for piece in pieces:
        assert piece in warning


def test_ordinary_records_bring_no_warning(read):
    assert read("demonstration", {"text": "a"}, {"text": "b"}).warnings == []
    assert read("demonstration", {"messages": [system, user, answer, user, answer]}).warnings == []
    tool = {"role": "tool", "content": "1"}
    assert read("demonstration", {"messages": [user, other, tool, tool, answer]}).warnings == []


def test_sharegpt_is_converted_with_a_warning(read):
    turns = [{"from": role, "value": text} for role, text in (("system", "s"), ("human", "q"), ("gpt", "a"))]
    for name in ("conversations", "messages"):
        loaded = read("demonstration", {name: turns}, {name: turns})
        assert loaded.records == [Demonstration((SYSTEM, USER), "a")] * 2
        [warning] = loaded.warnings
        assert "ShareGPT format" in warning
        assert "in 2 records" in warning
    with pytest.raises(DataError, match=r"conversations\[0\]\.from` is \"humn\", did you mean `human`"):
        read("demonstration", {"conversations": [{"from": "humn", "value": "q"}]})


@pytest.mark.parametrize("reverse", [False, True])
def test_strings_and_messages_are_not_mixed(read, reverse):
    rows = [{"prompt": "p", "completion": "c"}, {"messages": [user, answer]}]
    with pytest.raises(DataError, match=r"a\.jsonl:2: mixed: .*a\.jsonl:1"):
        read("demonstration", *(rows[::-1] if reverse else rows), max_skip=0.01)


@pytest.mark.parametrize(
    ("kind", "row", "mapping"),
    [
        ("demonstration", {"question": "q", "answer": "a"}, "{prompt: question, completion: answer}"),
        ("demonstration", {"problem": "q", "output": "a"}, "{completion: output, prompt: problem}"),
        ("demonstration", {"prompt": "q", "response": "a"}, "{completion: response}"),
        ("demonstration", {"Prompt": "q", "Completion": "a"}, "{prompt: Prompt, completion: Completion}"),
        ("demonstration", {"promt": "q", "completion": "a"}, "{prompt: promt}"),
        ("preference", {"question": "q", "better": "a", "worse": "b"}, "{prompt: question, chosen: better, rejected: worse}"),
        ("ranking", {"question": "q", "winner": "a", "loser": "b"}, "{prompt: question, chosen: winner, rejected: loser}"),
        ("ranking", {"prompt": "q", "responses": ["a", "b"], "ranks": [[0], [1]]}, "{completions: responses, ranking: ranks}"),
        ("prompt", {"question": "q"}, "{prompt: question}"),
    ],
)  # fmt: skip
def test_other_names_suggest_the_mapping_that_works(read, kind, row, mapping):
    with pytest.raises(DataError) as caught:
        read(kind, row)
    hint = str(caught.value.hint)
    pairs = dict(pair.split(": ") for pair in mapping.strip("{}").split(", "))
    assert "--set 'data.columns={" in hint
    found = hint.partition("data.columns={")[2].partition("}")[0]
    assert dict(pair.split(": ") for pair in found.split(", ")) == pairs
    assert len(read(kind, row, columns=pairs).records) == 1


def test_columns_are_mapped_first_and_only_where_they_are(read):
    columns = {"prompt": "question", "completion": "answer"}
    rows = [{"question": "q", "answer": "a", "prompt": "no"}, {"prompt": "p", "completion": "c"}]
    records = read("demonstration", *rows, columns=columns).records
    assert [(r.prompt, r.completion) for r in records] == [("q", "a"), ("p", "c")]
    swapped = read(
        "preference",
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        columns={"chosen": "rejected", "rejected": "chosen"},
    )
    assert swapped.records[0].completions == ("b", "a")
    with pytest.raises(DataError, match=r"maps `prompt` to `question`, which is not there"):
        read("demonstration", {"q": "q", "answer": "a"}, columns=columns)
    with pytest.raises(UsageError, match=r"`promt`.*did you mean `prompt`"):
        read("demonstration", {"q": "a"}, columns={"promt": "q"})  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "row", "look", "hint"),
    [
        ("demonstration", {"prompt": "p", "chosen": "a", "rejected": "b"}, "looks like a preference", "train-rm"),
        ("demonstration", {"prompt": "p", "completions": ["a"], "ranking": [[0]]}, "looks like a ranking", "train-rm"),
        ("demonstration", {"prompt": "p"}, "looks like a prompt without a completion", "`ppo`"),
        ("preference", {"prompt": "p", "completion": "c"}, "looks like a demonstration", "`sft`"),
        ("preference", {"messages": [user, answer]}, "looks like a demonstration (a conversation)", "`sft`"),
        ("prompt", {"text": "t"}, "looks like a demonstration (plain text)", "`sft`"),
    ],
)
def test_a_file_of_another_kind_is_recognized(read, kind, row, look, hint):
    with pytest.raises(DataError) as caught:
        read(kind, row)
    assert look in caught.value.message
    assert hint in str(caught.value.hint)


def test_messages_cannot_control_a_terminal(read):
    with pytest.raises(DataError) as caught:
        read("demonstration", {"prompt": ["\x1b[2J\u202e\x9b" * 3], "\x1b]0;x\x07": 1, "completion": "c"})
    assert caught.value.message.isprintable()
    with pytest.raises(DataError) as caught:
        read("demonstration", {"\x1b]0;x\x07": 1, "\u202e" * 500: 2})
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 600


def test_text_is_kept_to_the_byte(read):
    text = " \u00a0a\r\n\tb\u200b\x00e\u0301 "
    [record] = read("demonstration", {"prompt": text, "completion": text}).records
    assert (record.prompt, record.completion) == (text, text)
