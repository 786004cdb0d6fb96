# ruff: noqa: E501  (tables of cases: a case a line)

from __future__ import annotations

import json
import tracemalloc

import pytest

from rlhf_cli.data.readers import json_files, text_files
from rlhf_cli.data.sources import iter_records, read_records
from rlhf_cli.errors import DataError

GOOD = '{"prompt": "a", "completion": "b"}\n'


def places(source: str, kind: str = "demonstration") -> list[str]:
    return [record.location.rpartition(":")[2] for record in read_records(source, kind).records]  # type: ignore[arg-type]


def failure(source: str, kind: str = "demonstration") -> DataError:
    with pytest.raises(DataError) as caught:
        read_records(source, kind)  # type: ignore[arg-type]
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(GOOD + "\n  \n" + GOOD, ["1", "4"], id="blank lines count"),
        pytest.param(GOOD.replace("\n", "\r\n") * 2, ["1", "2"], id="CRLF"),
        pytest.param("\ufeff" + GOOD * 2, ["1", "2"], id="BOM"),
        pytest.param("\n\n" + GOOD.strip(), ["3"], id="no line end at the end"),
        pytest.param("  " + GOOD, ["1"], id="indented"),
        pytest.param('[{"prompt":"a","completion":"b"},{"prompt":"c","completion":"d"}]', ["1", "1"], id="array on a line"),
        pytest.param('\ufeff\n[\n {"prompt": "a",\n "completion": "b"}\n,\n{"prompt": "c", "completion": "d"}]\n', ["3", "6"],
                     id="array over lines: where each record begins"),
        pytest.param(GOOD.replace("\n", "\r") * 2, ["1", "2"], id="CR"),
        pytest.param('\n{\n"prompt": "a",\n"completion": "b"\n}\n{"prompt": "a",\n"completion": "b", "score": NaN}\n', ["2", "6"], id="objects over several lines"),
        pytest.param('{"prompt": "\u2028 \x85", "completion": "line\u2029"}\n' + GOOD, ["1", "2"], id="unicode line ends are text"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson"])
def test_json_lines_and_arrays_are_read_with_their_lines(write, content, expected, name):
    assert places(write(name, content)) == expected


@pytest.mark.parametrize(
    ("content", "place", "pieces"),
    [
        pytest.param(GOOD * 2 + '{"prompt": "a", "compl', 3, ["ends in the middle", "truncated?"], id="truncated in a name"),
        pytest.param(GOOD + '{"prompt": "a", "completion": "b"', 2, ["truncated?"], id="truncated before the brace"),
        pytest.param(GOOD + '{"prompt": "a" "completion": "b"}\n', 2, ["column 16", "',' delimiter"], id="missing comma"),
        pytest.param("  " + '{"prompt": "a" "completion": "b"}\n', 1, ["column 18"], id="column counts the indent"),
        pytest.param("{'prompt': 'a', 'completion': 'b'}\n", 1, ["not JSON", "single quotes", "column 2"], id="single quotes"),
        pytest.param('{"prompt": None}\n', 1, ["not JSON", "`None`"], id="None of Python"),
        pytest.param(GOOD + "42\n", 2, ["42", "must be an object"], id="bare number"),
        pytest.param('"hello"\n', 1, ['"hello"', "must be an object"], id="bare text"),
        pytest.param("null\n", 1, ["null", "must be an object"], id="bare null"),
        pytest.param(GOOD + "[1]\n", 2, ["[1]", "must be an object"], id="list on a later line"),
        pytest.param(GOOD + '{"prompt": NaN, "completion": "b"}\n', 2, ["`prompt` is NaN"], id="NaN names its field"),
        pytest.param('{"prompt": "a", "completion": -Infinity}\n', 1, ["`completion` is -Infinity"], id="Infinity"),
        pytest.param(GOOD + '{"prompt": "a", "prompt": "b"}\n', 2, ['"prompt"', "twice"], id="a key twice"),
        pytest.param('{"prompt": "a\tb"}\n', 1, ["control character", "column 14"], id="raw tab in a string"),
        pytest.param('{"n": ' + "9" * 5000 + "}\n", 1, ["thousands of digits"], id="a number of 5,000 digits"),
        pytest.param("[" * 100_000, 1, [], id="an array nested 100,000 deep"),
        pytest.param('{"a":' * 100_000, 1, ["nested too deeply"], id="an object nested 100,000 deep"),
        pytest.param('[{"prompt":"a","completion":"b"},\n{"prompt":"a" "b"}]', 2, ["column 15"], id="array: missing comma inside"),
        pytest.param('[{"prompt":"a","completion":"b"}\n {"a":1}]', 2, ["column 2", "between two records"], id="array: missing comma"),
        pytest.param('[{"prompt":"a","completion":"b"},\n]', 2, ["comma before the end"], id="array: trailing comma"),
        pytest.param('[{"prompt":"a","completion":"b"}', 1, ["ends before its `]`"], id="array: no end"),
        pytest.param('[{"prompt":"a","completion":"b"},\n{"prompt":"a', 2, ["truncated?"], id="array: cut in a record"),
        pytest.param('[{"prompt":"a","completion":"b"}]\n{"a":1}', 2, ["follows the end"], id="array: more behind it"),
        pytest.param('[{"prompt":"a","completion":"b"},\n\n42]', 3, ["42"], id="array: bare number"),
        pytest.param('[{"prompt":"a","completion":"b"},\n{"prompt": "a", "completion": NaN}]', 2, ["`completion` is NaN"], id="array: NaN"),
        pytest.param("[\n{'prompt': 'a'}]", 2, ["single quotes", "column 2"], id="array: single quotes"),
        pytest.param('{\n  "prompt": "a"\n}\n', 1, ["`completion` is missing"], id="an object over several lines"),
        pytest.param('{\n  "prompt": "a",\n "completion": "b', 3, ["ends in the middle"], id="an object over several lines, cut"),
        pytest.param(GOOD.encode() + '{"prompt": "café"}\n'.encode("latin-1"), 2, ["0xe9", "column 16"], id="Latin-1"),
        pytest.param(b'[\n{"prompt": "\xe9"}]', 2, ["0xe9", "column 13"], id="array: Latin-1"),
        pytest.param(GOOD.encode() + b"\x00" * 100, 2, ["zero bytes"], id="zeroes after a crash"),
    ],
)  # fmt: skip
def test_broken_json_is_refused_with_line_and_cause(write, content, place, pieces):
    source = write("a.jsonl", content)
    error = failure(source)
    assert error.message.startswith(f"{source}:{place}: ")
    for piece in pieces:
        assert piece in error.message


@pytest.mark.parametrize("content", ["", "\n", "\r\n \n", "[]", "\ufeff"], ids=repr)
def test_a_file_without_records_is_refused(write, content):
    assert "no records" in failure(write("a.jsonl", content)).message


def test_a_bad_line_far_down_has_its_own_number(write):
    lines = [GOOD] * 60_000
    lines[50_000] = '{"prompt": 1, "completion": b}\n'
    source = write("a.jsonl", "".join(lines))
    with pytest.raises(DataError, match=r"a\.jsonl:50001: not JSON at column 29"):
        for _ in iter_records(source, "demonstration", on_skip=lambda skip: None):
            pass


def test_an_array_of_many_pieces_is_read_as_one(write, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 7)  # cuts numbers, escapes, literals and characters of several bytes
    records = [
        {"prompt": f'é\\u"{n}\n', "completion": "🙂" * n + ".", "n": 12345, "t": [True, None]} for n in range(1, 40)
    ]
    for indent in (None, 1):
        source = write("a.json", json.dumps(records, ensure_ascii=indent is None, indent=indent))
        read = read_records(source, "demonstration").records
        assert [(r.prompt, r.completion) for r in read] == [(r["prompt"], r["completion"]) for r in records]
    assert places(source) == [str(2 + 9 * n) for n in range(39)]  # an indented record takes nine lines


def test_errors_of_an_array_of_many_pieces_keep_line_and_column(write, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 5)
    source = write("a.json", '[{"prompt": "aé", "completion": "b"},\n\n  {"prompt": "a" "b"}]')
    assert failure(source).message.startswith(f"{source}:3: not JSON at column 18")


def test_a_line_without_end_is_refused_before_it_fills_the_memory(write, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_RECORD_BYTES", 1000)
    source = write("a.jsonl", GOOD + '{"prompt": "' + "x" * 5_000_000)
    tracemalloc.start()
    try:
        assert "a.jsonl:2: the line is longer" in failure(source).message
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    monkeypatch.setattr(json_files, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 100)
    assert "a.json:1: the record is longer" in failure(write("a.json", '[{"prompt": "' + "x" * 4000)).message


@pytest.mark.parametrize("form", ["lines", "array"])
def test_memory_is_bounded_by_a_record_not_by_the_file(tmp_path, form):
    path = tmp_path / "big.jsonl"
    record = json.dumps({"prompt": "p" * 500, "completion": "c" * 1500})
    count = 10_000  # 20 MB
    joint = ",\n" if form == "array" else "\n"
    with path.open("w") as file:
        file.write("[" * (form == "array") + joint.join([record] * count) + "]" * (form == "array") + "\n")
    tracemalloc.start()
    try:
        read = sum(1 for _ in iter_records(str(path), "demonstration", on_skip=lambda skip: None))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read == count
    assert path.stat().st_size > 20e6
    assert peak < 6e6
