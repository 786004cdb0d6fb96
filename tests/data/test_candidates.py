"""Candidates: completions to be ranked, in every format, with their known order and without repeats."""

# ruff: noqa: E501  (tables of cases: a case a line)

from __future__ import annotations

import pytest

from rlhf_cli.data.records import Candidates, Message
from rlhf_cli.data.sources import iter_records, read_records, validate_source
from rlhf_cli.errors import DataError

user, one, two = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
HH = "\n\nHuman: hi\n\nAssistant:"
PAIR = ((0,), (1,))


@pytest.fixture
def read(write):
    return lambda *rows, **options: read_records(
        write("a.jsonl", list(rows)), "candidates", **({"max_skip": 0.9} | options)
    )


@pytest.mark.parametrize(
    ("row", "record"),
    [
        pytest.param({"prompt": "p", "completions": ["a", "b", "c"]}, Candidates("p", ("a", "b", "c")), id="nobody ranked them"),
        pytest.param({"prompt": [user], "completions": ["a", "b"]}, Candidates((Message("user", "q"),), ("a", "b")), id="to a conversation"),
        pytest.param({"prompt": "p", "completions": ["a", "b", "c"], "ranking": [[2], [0, 1]]},
                     Candidates("p", ("a", "b", "c"), ((2,), (0, 1))), id="a ranking is known"),
        pytest.param({"prompt": "p", "completions": ["a", "b"], "ranking": None}, Candidates("p", ("a", "b")), id="a table's empty ranking"),
        pytest.param({"prompt": "p", "chosen": "a", "rejected": "b", "subset": "chat"}, Candidates("p", ("a", "b"), PAIR, "chat"), id="a preference, its subset"),
        pytest.param({"prompt": "p", "completions": ["a", "b"], "subset": ""}, Candidates("p", ("a", "b")), id="no subset"),
        pytest.param({"chosen": HH + " a", "rejected": HH + " b"}, Candidates(HH, (" a", " b"), PAIR), id="HH"),
        pytest.param({"prompt": [user], "chosen": [one], "rejected": [two]}, Candidates((Message("user", "q"),), ("a", "b"), PAIR), id="messages"),
        pytest.param({"chosen": [user, one], "rejected": [user, two]}, Candidates((Message("user", "q"),), ("a", "b"), PAIR), id="conversations"),
        pytest.param({"prompt": "p", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math"},
                     Candidates("p", ("a", "b", "c", "d"), ((0,), (1, 2, 3)), "Math"), id="best of four"),
        pytest.param({"prompt": "p", "chosen": ["a", "b"], "rejected": ["c"]}, Candidates("p", ("a", "b", "c"), ((0, 1), (2,))), id="best of n with ties"),
        pytest.param({"prompt": "p", "chosen": "a", "rejected": ["b", "c"]}, Candidates("p", ("a", "b", "c"), ((0,), (1, 2))), id="one chosen, some rejected"),
        pytest.param({"prompt": "p", "completions": ["a", "b", "a"]}, Candidates("p", ("a", "b")), id="the same answer twice"),
        pytest.param({"prompt": "p", "completions": ["c", "a", "b", "a"], "ranking": [[3, 1], [0], [2]]},
                     Candidates("p", ("c", "a", "b"), ((1,), (0,), (2,))), id="the same answer twice in a tier"),
    ],
)  # fmt: skip
def test_every_format_becomes_candidates(read, row, record):
    assert read(row).records == [record]


@pytest.mark.parametrize(
    ("row", "pieces"),
    [
        pytest.param(
            {"prompt": "p"}, ["`completions` is missing", "completions to be ranked are expected"], id="no answers"
        ),
        pytest.param(
            {"prompt": "p", "completions": ["a"]}, ['`completions` is ["a"]', "at least two"], id="one answer"
        ),
        pytest.param({"prompt": "p", "completions": ["a", None]}, ["`completions[1]` is null"], id="null"),
        pytest.param({"completions": ["a", "b"]}, ["`prompt` is missing"], id="no prompt"),
        pytest.param({"prompt": "p", "completions": ["a", "b"], "ranking": [[0]]}, ["lacks 1"], id="bad ranking"),
        pytest.param({"prompt": "p", "completions": ["a", "b"], "subset": ["x"]}, ["`subset` is"], id="bad subset"),
        pytest.param(
            {"prompt": "p", "chosen": [], "rejected": ["b"]}, ["`chosen` is an empty list"], id="nothing chosen"
        ),
        pytest.param(
            {"prompt": "p", "chosen": ["a", 3], "rejected": ["b"]}, ["`chosen[1]` is 3"], id="chosen a number"
        ),
        pytest.param({"chosen": ["a"], "rejected": ["b"]}, ["`prompt` is missing"], id="best of n without prompt"),
        pytest.param({"prompt": "p", "chosen": "a"}, ["`rejected` is missing"], id="no rejected"),
        pytest.param({"question": "p", "responses": ["a", "b"]}, ["`completions` are missing"], id="other names"),
    ],
)
def test_wrong_rows_are_refused_with_their_line(write, row, pieces):
    from json import dumps

    source = write("a.jsonl", "\n" + dumps(row) + "\n")
    for check in (read_records, validate_source):
        with pytest.raises(DataError) as caught:
            check(source, "candidates")
        assert caught.value.message.startswith(f"{source}:2: ")
        for piece in pieces:
            assert piece in caught.value.message


def test_other_names_suggest_a_mapping_that_works(read):
    row = {"question": "p", "responses": ["a", "b"]}
    with pytest.raises(DataError) as caught:
        read(row)
    assert "data.columns={prompt: question, completions: responses}" in str(caught.value.hint)
    columns = {"prompt": "question", "completions": "responses"}
    assert read(row, columns=columns).records == [Candidates("p", ("a", "b"))]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "completions": ["a", "a"]}, "completions all the same"),
        ({"prompt": "p", "completions": ["a", "a", "a"]}, "completions all the same"),
        ({"prompt": "p", "completions": ["a", "b", "a"], "ranking": [[0], [1], [2]]}, "same completion in two tiers"),
        ({"prompt": "p", "chosen": ["a", "b"], "rejected": ["b", "c"]}, "same completion in two tiers"),
        ({"prompt": "p", "completions": ["a", "", "b"]}, "empty completion"),
        ({"prompt": "p", "chosen": ["a"], "rejected": ["b", " "]}, "white space only"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen equal to rejected"),
    ],
)
def test_rows_without_a_signal_are_skipped_and_counted(read, row, reason):
    loaded = read({"prompt": "g", "completions": ["a", "b"]}, row)
    assert (len(loaded.records), loaded.skips.total) == (1, 1)
    assert reason in next(iter(loaded.skips.counts))


def test_an_empty_completion_of_a_model_can_be_ranked(write):
    source = write("a.jsonl", [{"prompt": "p", "completions": ["a", ""]}])
    assert read_records(source, "candidates", keep_blank=True).records == [Candidates("p", ("a", ""))]
    assert validate_source(source, "candidates", keep_blank=True).records == 1


def test_conversions_are_reported_as_warnings(read):
    [warning] = read({"prompt": "p", "completions": ["a", "b", "a"]}).warnings
    assert "the same completion more than once" in warning
    [warning] = read({"prompt": "p", "chosen": ["a"], "rejected": ["b"]}).warnings
    assert "best of n" in warning
    assert read({"prompt": "p", "completions": ["a", "b"]}, {"prompt": "p", "completions": ["a", "c"]}).warnings == []


@pytest.mark.parametrize(
    ("rows", "known"),
    [
        pytest.param([{"completions": ["a", "b"]}, {"completions": ["a", "b"]}], None, id="nothing known"),
        pytest.param([{"completions": ["a", "b"]}, {"completions": ["b", "a"]}], None, id="another order is the same answers"),
        pytest.param([{"completions": ["a", "b"]}, {"chosen": "b", "rejected": "a"}], ((1,), (0,)), id="the later knows"),
        pytest.param([{"chosen": "a", "rejected": "b"}, {"completions": ["b", "a"]}], PAIR, id="the first knows"),
        pytest.param([{"chosen": "a", "rejected": "b"}, {"completions": ["b", "a"], "ranking": [[1], [0]]}], PAIR, id="they agree"),
        pytest.param([{"chosen": "a", "rejected": "b"}, {"chosen": "b", "rejected": "a"}], None, id="they disagree"),
        pytest.param([{"chosen": "a", "rejected": "b"}, {"chosen": "b", "rejected": "a"}, {"chosen": "a", "rejected": "b"}], None, id="two of three"),
    ],
)  # fmt: skip
def test_repeated_completions_are_one_item(write, rows, known):
    rows = [{"prompt": "p"} | row for row in rows]
    source = write("a.jsonl", [*rows, {"prompt": "other", "completions": ["a", "b"]}])
    loaded = read_records(source, "candidates")
    assert loaded.records == [Candidates("p", ("a", "b"), known), Candidates("other", ("a", "b"))]
    [warning] = loaded.warnings
    assert f"{len(rows) - 1} record" in warning
    report = validate_source(source, "candidates")
    assert (report.records, report.warnings) == (2, [warning])
    assert len(list(iter_records(source, "candidates", on_skip=lambda skip: None))) == len(rows) + 1


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "count", "answers"),
    [("qa_rankings.jsonl", 370, 4), ("llmbar_judge.jsonl", 419, 2), ("hh_harmless_pairs.jsonl.gz", 1887, 2)],
)
def test_real_rankings_and_preferences_can_be_ranked_again(shared_data, name, count, answers):
    loaded = read_records(str(shared_data / name), "candidates")
    assert len(loaded.records) == count
    assert all(len(record.completions) == answers and record.known for record in loaded.records)
    assert (loaded.records[0].subset is not None) == (name == "llmbar_judge.jsonl")
