# ruff: noqa: E501  (tables of cases: a case a line)

from __future__ import annotations

import gzip
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_cli.data.records import Message, Ranking
from rlhf_cli.data.sources import read_records
from rlhf_cli.errors import DataError


def failure(source: str, kind: str = "demonstration") -> DataError:
    with pytest.raises(DataError) as caught:
        read_records(source, kind)  # type: ignore[arg-type]
    assert caught.value.hint
    return caught.value


def test_csv_is_read_with_the_line_each_row_begins_on(write):
    source = write("a.csv", '\ufeffid,prompt,completion\r\n1,"a ""b"", c","two\r\nlines"\r\n\r\n2,x,y\r\n')
    records = read_records(source, "demonstration").records
    assert [(r.prompt, r.completion, r.location) for r in records] == [
        ('a "b", c', "two\r\nlines", f"{source}:2"),
        ("x", "y", f"{source}:5"),
    ]


def test_csv_holds_lists_as_json_and_margins_as_text(write):
    source = write(
        "a.csv",
        'prompt,completions,ranking,margin\np,"[""a"", ""b""]","[[1], [0]]",0.5\nq,"[""a"", ""b""]","[[0, 1]]",\n',
    )
    assert read_records(source, "ranking").records == [
        Ranking("p", ("a", "b"), ((1,), (0,)), 0.5),
        Ranking("q", ("a", "b"), ((0, 1),)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "place", "pieces"),
    [
        pytest.param('prompt,completion\na,b\nc,"d\ne,f\ng,h\n', 3, ["a quote opens"], id="unclosed quote: to the end"),
        pytest.param('prompt,completion\na,b\nc,"d\ne,"f"\n', 3, ["a quote opens"], id="unclosed quote: closed by another"),
        pytest.param('prompt,completion\n"a\nb","c\nd,e\n', 3, ["a quote opens"], id="unclosed quote: the second of its row"),
        pytest.param('prompt,completion\n"a\nb","c" d\n', 3, ["a quote opens"], id="text behind a closing quote"),
        pytest.param("prompt,completion\na,b\nc\n", 3, ["1 fields", "2"], id="too few fields"),
        pytest.param("prompt,completion\na,b,c\n", 2, ["3 fields"], id="too many fields"),
        pytest.param("prompt,prompt\na,b\n", 1, ["twice"], id="a column twice"),
        pytest.param('prompt,completions,ranking\nq,"[a","[[0]]"\n', 2, ["`completions`", "not a JSON list"], id="no list"),
        pytest.param("prompt,chosen,rejected,margin\nq,a,b,much\n", 2, ['`margin` is "much"'], id="margin no number"),
        pytest.param("prompt,chosen,rejected,margin\nq,a,b,nan\n", 2, ["`margin`"], id="margin nan"),
    ],
)  # fmt: skip
def test_broken_csv_is_refused_with_line_and_cause(write, content, place, pieces):
    source = write("a.csv", content)
    error = failure(source, "preference" if "completion\n" not in content else "demonstration")
    assert error.message.startswith(f"{source}:{place}: ")
    for piece in pieces:
        assert piece in error.message


def test_a_long_quote_is_refused_before_it_fills_the_memory(write, monkeypatch):
    from rlhf_cli.data.readers import table_files

    monkeypatch.setattr(table_files, "MAX_RECORD_BYTES", 1000)
    content = 'prompt,completion\na,b\nc,"d\n' + "e,f\n" * 1000
    assert ":3: a quote opens" in failure(write("a.csv", content)).message


@pytest.mark.parametrize("content", ["", "\n\n", "prompt,completion\n"], ids=repr)
def test_csv_without_rows_is_refused(write, content):
    assert "no records" in failure(write("a.csv", content)).message


def parquet_bytes(columns: dict, **options) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz", "misnamed.jsonl"])
def test_parquet_is_read_by_row_groups(write, name):
    columns = {"prompt": [f"p{n}" for n in range(700)], "completion": [f"c{n}" for n in range(700)]}
    content = parquet_bytes(columns, row_group_size=300)
    source = write(name, gzip.compress(content) if name.endswith(".gz") else content)
    records = read_records(source, "demonstration").records
    assert [r.prompt for r in records] == columns["prompt"]
    assert [records[0].location, records[699].location] == [f"{source}:row 1", f"{source}:row 700"]


def test_parquet_of_several_formats_and_with_columns_that_are_not_text(write):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    table = {
        "prompt": pa.array([None, "x"]),
        "completion": pa.array([None, "y"]).dictionary_encode(),
        "messages": pa.array([turns, None]),
        "when": pa.array([2**61, 2**61], pa.timestamp("us")),  # a year that Python has no date for
        "blob": pa.array([b"\x00", b"\xff"]),
    }
    source = write(
        "a.parquet", parquet_bytes({k: v for k, v in table.items() if k != "prompt"} | {"prompt": table["prompt"]})
    )
    with pytest.raises(DataError, match=r"row 2: mixed: .* strings here and as messages at .*row 1"):
        read_records(source, "demonstration")
    only = {name: column[:1] for name, column in table.items()}
    [record] = read_records(write("b.parquet", parquet_bytes(only)), "demonstration").records
    assert (record.prompt, record.completion) == ((Message("user", "q"),), "a")  # fmt: skip


def test_times_and_bytes_inside_of_a_column_do_not_take_it_away(write):
    from datetime import datetime

    turns = [
        {"role": role, "content": text, "at": datetime(2026, 1, 1), "raw": b"\xff"}
        for role, text in (("user", "q"), ("assistant", "a"))
    ]
    source = write("a.parquet", parquet_bytes({"messages": pa.array([turns]), "x.y": ["dots in a name"]}))
    [record] = read_records(source, "demonstration").records
    assert (record.prompt, record.completion) == ((Message("user", "q"),), "a")


def test_text_held_as_bytes_is_read_and_pictures_are_not_overlooked(write):
    columns = {"prompt": ["q", "r"], "completion": pa.array(["é".encode(), b"b"])}
    records = read_records(write("a.parquet", parquet_bytes(columns)), "demonstration").records
    assert [one.completion for one in records] == ["é", "b"]
    picture = pa.array([{"bytes": b"\x89PNG", "path": "a.png"}, None])
    source = write("b.parquet", parquet_bytes(columns | {"image": picture}))
    loaded = read_records(source, "demonstration", max_skip=0.5)
    assert (len(loaded.records), list(loaded.skips.counts)) == (1, ["images, audio or video, which are not read"])
    broken = write("c.parquet", parquet_bytes({"prompt": ["q"], "completion": pa.array([b"\xff"])}))
    assert "`completion` is" in failure(broken).message


def test_null_in_parquet_counts_as_missing(write):
    source = write("a.parquet", parquet_bytes({"prompt": ["a", "b"], "completion": ["c", None]}))
    assert failure(source).message.startswith(f"{source}:row 2: `completion` is null")
    source = write("b.parquet", parquet_bytes({"prompt": ["a"]}))
    assert "`completion` is missing" in failure(source).message


@pytest.mark.parametrize("keep", [0, 4, 100, -9, -1])
def test_truncated_parquet_is_refused(write, keep):
    content = parquet_bytes({"prompt": ["a" * 50] * 50, "completion": ["b"] * 50})
    source = write("a.parquet", content[:keep])
    message = failure(source).message
    assert message.startswith(f"{source}: ")
    assert "empty" in message if keep == 0 else "truncated" in message


def test_damaged_pages_of_parquet_name_the_row(write):
    content = bytearray(parquet_bytes({"prompt": [f"a{n}" for n in range(3000)], "completion": ["b"] * 3000}, row_group_size=1000, compression="gzip", use_dictionary=False))  # fmt: skip
    size = len(content)
    content[size // 2 : size // 2 + 400] = bytes(400)
    source = write("a.parquet", bytes(content))
    assert "truncated" in failure(source).message


def test_text_named_parquet_is_refused(write):
    assert "not Parquet" in failure(write("a.parquet", "prompt,completion\na,b\n")).message


@pytest.mark.parametrize("keep", [5, 60, -4])
def test_truncated_gzip_is_refused(write, keep):
    content = gzip.compress(b"".join(b'{"prompt": "%d", "completion": "b"}\n' % n for n in range(1000)))
    source = write("a.jsonl.gz", content[:keep])
    message = failure(source).message
    assert message.startswith(source)
    assert "truncated" in message


def test_damaged_gzip_is_refused(write):
    content = bytearray(gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 100))
    content[-6] ^= 1  # the checksum
    assert "gzip data is damaged" in failure(write("a.jsonl.gz", bytes(content))).message


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.JSONL.GZ"])
def test_gzip_is_known_by_its_bytes(write, name):
    line = b'{"prompt": "a", "completion": "b"}\n'
    for content in (line, gzip.compress(line), gzip.compress(line[:9]) + gzip.compress(line[9:])):
        assert len(read_records(write(name, content), "demonstration").records) == 1


@pytest.mark.parametrize(("magic", "name"), [(b"PK\x03\x04", "zip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh9", "bzip2")])
def test_other_compressions_are_named(write, magic, name):
    assert f"compressed with {name}" in failure(write("a.jsonl", magic + b"\x01" * 50)).message


def test_csv_and_gzip_share_the_text_checks(write):
    mixed = "prompt,completion\né,b\n".encode() + "c,é\n".encode("latin-1")
    assert ":3: byte 0xe9" in failure(write("a.csv", mixed)).message
