"""Files as spreadsheets, scripts and downloads leave them: read, or called by their name."""

# ruff: noqa: E501, RUF001  (tables of cases: a case a line; text as programs write it)

from __future__ import annotations

import gzip
import io
import json
import sys
import zipfile

import pytest

from rlhf_cli.data.records import Demonstration, PromptRecord
from rlhf_cli.data.sources import read_records
from rlhf_cli.errors import DataError

EXPECTED = [Demonstration("“é” – 5 €", 'a "b";\tc'), Demonstration("q", "two\nlines")]


def table(delimiter: str, end: str = "\r\n") -> str:
    """The records of EXPECTED as a table."""
    rows = ["prompt,completion", '“é” – 5 €,"a ""b"";\tc"', 'q,"two\nlines"']
    return "".join(row.replace(",", delimiter) + end for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.csv", table(";"), id="semicolons"),
        pytest.param("a.csv", table("\t"), id="tabs"),
        pytest.param("a.tsv", table("\t"), id="tsv"),
        pytest.param("a.csv", table("|"), id="bars"),
        pytest.param("a.csv", "sep=;\r\n" + table(";"), id="sep"),
        pytest.param("a.csv", '\ufeff"sep=,"\r\n' + table(","), id="sep, quoted, with a mark"),
        pytest.param("a.csv", table(";") + ";\r\n;\r\n\r\n" + " ; \r\n", id="empty rows at the end"),
        pytest.param("a.csv", table(",") + ",,,,\r\n", id="a wider empty row"),
        pytest.param("a.csv", table(",", "\r").replace("two\nlines", "two\rlines"), id="CR"),
        pytest.param("a.csv", table(";").encode("cp1252"), id="Windows-1252"),
        pytest.param("a.csv", table(";").encode("utf-16"), id="UTF-16"),
        pytest.param("a.tsv", table("\t").encode("utf-16-le"), id="UTF-16 without a mark"),
        pytest.param("a.csv.gz", gzip.compress(table(";").encode("utf-32")), id="UTF-32, packed"),
    ],
)
def test_tables_of_spreadsheets_are_read(write, name, content):
    source = write(name, content)
    loaded = read_records(source, "demonstration")
    assert loaded.records == EXPECTED
    assert loaded.records[0].location.endswith(":3" if b"sep=" in _bytes(content) else ":2")
    is_windows = isinstance(content, bytes) and content == table(";").encode("cp1252")
    assert any("Windows-1252" in line for line in loaded.warnings) == is_windows


def _bytes(content: str | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.encode()


def test_rows_keep_their_lines_after_empty_ones(write):
    source = write("a.csv", "prompt,completion\na,b\n\n,\nc,d\n")
    assert [one.location for one in read_records(source, "demonstration").records] == [f"{source}:2", f"{source}:5"]


def test_the_column_of_numbers_that_pandas_writes_is_no_field(write):
    [record] = read_records(write("a.csv", ",prompt,completion\n0,p,c\n"), "demonstration").records
    assert record == Demonstration("p", "c")


@pytest.mark.parametrize(
    ("content", "piece", "hint"),
    [
        pytest.param(
            "prompt,completion\né,b\n".encode() + "é,d\n".encode("cp1252"),
            ":3: byte 0xe9 at column 1 is not UTF-8",
            "iconv -f CP1252",
            id="UTF-8, then not",
        ),
        pytest.param(
            b"prompt,completion\n\xe9,b\n\x81,d\n",
            ":3: byte 0x81 at column 1 is not Windows-1252",
            "save the file as UTF-8",
            id="not Windows-1252",
        ),
    ],
)
def test_two_encodings_in_one_table_are_refused(write, content, piece, hint):
    with pytest.raises(DataError, match=piece) as caught:
        read_records(write("a.csv", content), "demonstration")
    assert hint in str(caught.value.hint)


RECORDS = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(3)]


@pytest.mark.parametrize(
    ("value", "indent"),
    [
        pytest.param({"data": RECORDS}, None, id="data"),
        pytest.param({"version": "1", "examples": RECORDS}, 2, id="examples, indented"),
        pytest.param({"rows": [{"row_idx": 0, "row": one, "truncated_cells": []} for one in RECORDS]}, None, id="viewer"),
        pytest.param({name: {str(n): RECORDS[n][name] for n in range(3)} for name in RECORDS[0]}, None, id="columns"),
        pytest.param({name: {str(n): RECORDS[n][name] for n in range(3)} for name in RECORDS[0]}, 1, id="columns, indented"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_records_in_one_object_are_read(write, value, indent, name):
    loaded = read_records(write(name, json.dumps(value, indent=indent)), "demonstration")
    assert [(one.prompt, one.completion) for one in loaded.records] == [("p0", "c0"), ("p1", "c1"), ("p2", "c2")]
    assert loaded.records[1].location.endswith(("[1])", "(index 1)"))


def test_a_record_with_a_list_of_objects_is_no_wrapper(write):
    rows = [{"prompt": "p", "completion": "c", "data": [{"a": 1}]}]
    assert len(read_records(write("a.jsonl", rows), "demonstration").records) == 1
    two = [{"text": "t", "rows": [{"text": "x"}]}, {"text": "u"}]
    assert [one.completion for one in read_records(write("a.jsonl", two), "demonstration").records] == ["t", "u"]


def test_cells_that_a_viewer_cut_are_refused(write):
    rows = {"rows": [{"row_idx": 0, "row": RECORDS[0], "truncated_cells": ["prompt"]}]}
    with pytest.raises(DataError, match="cut off"):
        read_records(write("a.json", json.dumps(rows)), "demonstration")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_json_lines_in_wide_encodings_are_read(write, encoding):
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in [*RECORDS, {"prompt": "é", "completion": "€"}])
    loaded = read_records(write("a.jsonl", text.encode(encoding)), "demonstration")
    assert loaded.records[-1] == Demonstration("é", "€")
    assert loaded.records[-1].location.endswith(":4")


def test_nan_is_refused_only_where_it_is_used(write):
    source = write("a.jsonl", '{"prompt": "p", "completion": "c", "score": NaN, "x": {"y": -Infinity}}\n')
    assert len(read_records(source, "demonstration").records) == 1
    with pytest.raises(DataError, match=r"`reference` is .*NaN"):
        read_records(write("a.jsonl", '{"prompt": "p", "reference": [NaN]}\n'), "prompt")


def test_prompts_one_a_line(write):
    source = write("a.txt", "first\n\n  second, with a comma \n“third”\n")
    loaded = read_records(source, "prompt")
    assert loaded.records == [PromptRecord(text) for text in ("first", "second, with a comma", "“third”")]
    assert [one.location for one in loaded.records] == [f"{source}:{line}" for line in (1, 3, 4)]
    with pytest.raises(DataError, match="looks like a prompt without a completion"):
        read_records(source, "demonstration")


def test_other_data_named_txt_is_not_taken_for_prompts(write):
    lines = "".join(json.dumps(one) + "\n" for one in RECORDS)
    for text in (lines, "\ufeff" + lines, json.dumps(RECORDS)):
        assert [one.prompt for one in read_records(write("a.txt", text), "prompt").records] == ["p0", "p1", "p2"]
    with pytest.raises(DataError, match="is a table with a header") as caught:
        read_records(write("a.txt", "id;Prompt;completion\n1;p;c\n"), "prompt")
    assert ".csv" in str(caught.value.hint)


def test_a_readme_in_a_folder_is_no_data(write, tmp_path):
    write("data/a.jsonl", RECORDS)
    write("data/README.txt", "about\n")
    assert len(read_records(str(tmp_path / "data"), "demonstration").records) == 3


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.parquet"])
@pytest.mark.parametrize(
    ("content", "piece", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer", "git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><title>Sign in</title>", "is a web page", "login"),
        (b"<html lang=en>", "is a web page", "login"),
    ],
)
def test_what_is_no_data_is_called_by_its_name(write, name, content, piece, hint):
    with pytest.raises(DataError, match=piece) as caught:
        read_records(write(name, content), "demonstration")
    assert hint in str(caught.value.hint)


# Spreadsheets


def workbook(*sheets: list[list[str | float]]) -> bytes:
    """A minimal .xlsx file."""
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    relations = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"
    numbers = range(1, len(sheets) + 1)
    files = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Default Extension="xml" ContentType="application/xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
        f'Type="{relations}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{relations}"><sheets>'
        + "".join(f'<sheet name="S{n}" sheetId="{n}" r:id="r{n}"/>' for n in numbers)
        + "</sheets></workbook>",
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships">'
        + "".join(
            f'<Relationship Id="r{n}" Type="{relations}/worksheet" Target="worksheets/sheet{n}.xml"/>' for n in numbers
        )
        + "</Relationships>",
    }
    for number, rows in enumerate(sheets, 1):
        cells = "".join(
            f'<row r="{y}">' + "".join(_cell(f"{chr(64 + x)}{y}", value) for x, value in enumerate(row, 1)) + "</row>"
            for y, row in enumerate(rows, 1)
        )
        files[f"xl/worksheets/sheet{number}.xml"] = (
            f'<worksheet xmlns="{main}"><sheetData>{cells}</sheetData></worksheet>'
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def _cell(name: str, value: str | float) -> str:
    if isinstance(value, str):
        return f'<c r="{name}" t="inlineStr"><is><t>{value}</t></is></c>'
    return f'<c r="{name}"><v>{value}</v></c>'


ROWS: list[list[str | float]] = [
    ["prompt", "response_1", "response_2", "winner"],
    ["q", "a", "b", 2.0],
    ["", "", "", ""],
]


def test_a_spreadsheet_is_read_by_a_library(write):
    pytest.importorskip("python_calamine")
    source = write("a.xlsx", workbook(ROWS, [[""]]))
    [ranking] = read_records(source, "ranking").records
    assert (ranking.completions, ranking.tiers, ranking.location) == (("a", "b"), ((1,), (0,)), f"{source}:row 2")
    with pytest.raises(DataError, match="several sheets hold rows: `S1`, `S2`"):
        read_records(write("b.xlsx", workbook(ROWS, ROWS)), "ranking")
    with pytest.raises(DataError, match='"prompt" occurs twice'):
        read_records(write("c.xlsx", workbook([["prompt", "prompt"], ["a", "b"]])), "ranking")
    with pytest.raises(DataError, match="cannot be read as a spreadsheet"):
        read_records(write("d.xlsx", b"PK\x03\x04" + bytes(50)), "ranking")


def test_a_missing_library_is_named_with_its_command(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "python_calamine", None)
    with pytest.raises(DataError, match="not installed") as caught:
        read_records(write("a.xlsx", workbook(ROWS)), "ranking")
    assert "pip install python-calamine" in str(caught.value.hint)


def test_a_spreadsheet_of_another_name_is_told_apart_from_an_archive(write):
    with pytest.raises(DataError, match="compressed with zip") as caught:
        read_records(write("a.csv", workbook(ROWS)), "ranking")
    assert ".xlsx" in str(caught.value.hint)
