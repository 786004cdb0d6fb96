# ruff: noqa: E501  (tables of cases: a case a line)

from __future__ import annotations

import json

import pytest

from rlhf_cli.data.skips import Skip, SkipLog
from rlhf_cli.data.sources import read_records, validate_source
from rlhf_cli.errors import DataError


def log(count: int, keep: int | None = None) -> SkipLog:
    skips = SkipLog(keep)
    for number in range(count):
        skips.add(Skip(f"f:{number}", "odd" if number % 3 == 1 else "empty", "…"))
    return skips


@pytest.mark.parametrize(
    ("skipped", "total", "share", "fails"),
    [(0, 0, 0.0, False), (1, 100, 0.01, False), (2, 100, 0.01, True), (1, 99, 0.01, True), (1, 2, 0.0, True), (5, 5, 1.0, True), (4, 5, 1.0, False)],
)  # fmt: skip
def test_too_many_skips_fail(skipped, total, share, fails):
    if not fails:
        log(skipped).check(total, share, "f")
        return
    with pytest.raises(DataError) as caught:
        log(skipped).check(total, share, "f")
    assert f"{skipped:,}" in caught.value.message
    assert "the first is f:0" in caught.value.message


def test_the_hint_names_a_share_that_suffices():
    with pytest.raises(DataError) as caught:
        log(7).check(100, 0.01, "f")
    assert "7 of 100 records (7.00%)" in caught.value.message
    assert "5 empty, 2 odd" in caught.value.message
    share = float(str(caught.value.hint).partition("max_skip=")[2].strip("`"))
    log(7).check(100, share, "f")
    assert share < 0.1


def test_skips_are_written_and_counted(tmp_path):
    skips = log(4)
    skips.write(tmp_path / "skips.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "skips.jsonl").read_text().splitlines()]
    assert lines[1] == {"location": "f:1", "reason": "odd", "excerpt": "…"}
    assert (len(lines), skips.counts, skips.total) == (4, {"empty": 3, "odd": 1}, 4)


def test_a_log_of_a_long_file_keeps_the_first_and_counts_all():
    skips = log(100, keep=3)
    assert [skip.location for skip in skips] == ["f:0", "f:1", "f:2"]
    assert skips.total == 100


@pytest.mark.parametrize("check", [read_records, validate_source])
def test_sources_fail_above_the_share(write, check):
    rows = [{"prompt": "p", "completion": "c"}] * 99
    check(write("a.jsonl", [*rows, {"prompt": "p", "completion": ""}]), "demonstration", max_skip=0.01)
    with pytest.raises(DataError, match=r"2 of 101 records .*a\.jsonl:1\b"):
        check(
            write("a.jsonl", [{"prompt": "p", "completion": " "}, *rows, {"prompt": "p", "completion": ""}]),
            "demonstration",
        )
    with pytest.raises(DataError, match="none of its 1 records"):
        check(write("a.jsonl", [{"prompt": "p", "completion": ""}]), "demonstration", max_skip=1.0)
