# ruff: noqa: E501  (tables of cases: a case a line)

from __future__ import annotations

import random

import pytest

from rlhf_cli.data.checks import PromptKeys, RankingChecks, hash64
from rlhf_cli.data.records import Demonstration, Message, PromptRecord, Ranking
from rlhf_cli.data.sources import iter_records, read_records, validate_source
from rlhf_cli.data.splits import Split


def pair(better: str, worse: str, prompt: str = "p", **fields) -> dict:
    return {"prompt": prompt, "chosen": better, "rejected": worse, **fields}


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        pytest.param([pair("a", "b"), pair("b", "a")], 1, id="both ways"),
        pytest.param([pair("a", "b"), pair("a", "b")], 0, id="the same twice"),
        pytest.param([pair("a", "b"), pair("b", "a", "other")], 0, id="another prompt"),
        pytest.param([pair("a", "b"), pair("b", "a"), pair("b", "a"), pair("a", "b")], 1, id="a pair counts once"),
        pytest.param([pair("a", "b"), pair("b", "c"), pair("c", "a")], 0, id="a cycle is no contradiction of a pair"),
        pytest.param([{"prompt": "p", "completions": ["a", "b", "c"], "ranking": [[2], [0, 1]]}, pair("a", "c"), pair("b", "c"), pair("a", "b")],
                     2, id="a ranking of three against pairs; its tie contradicts nothing"),
        pytest.param([pair("a", "b", annotator="x"), pair("b", "a", annotator="y")], 1, id="two annotators disagree"),
        pytest.param([pair("a", "b", annotator="x"), pair("b", "a", annotator="x")], 0, id="one annotator changed their mind"),
    ],
)  # fmt: skip
def test_pairs_ranked_both_ways_are_counted_once(write, rows, count):
    source = write("a.jsonl", rows)
    for warnings in (read_records(source, "preference").warnings, validate_source(source, "preference").warnings):
        found = [warning for warning in warnings if "both ways" in warning]
        assert len(found) == (count > 0)
        if count:
            assert f"{count} pair{'s' if count > 1 else ''} of" in found[0]


def test_contradictions_agree_with_a_plain_count():
    draw = random.Random(0)
    rankings, seen = RankingChecks(), set()
    for _ in range(300):
        prompt, a, b = draw.choice("pq"), *draw.sample("abcdefghij", 2)
        rankings.add(Ranking(prompt, (a, b), ((0,), (1,))))
        seen.add((prompt, a, b))
    assert rankings.contradictions() == sum((p, b, a) in seen for p, a, b in seen if a < b)


def test_the_latest_ranking_of_an_annotator_is_kept_and_repeats_are_counted(write):
    rows = [
        pair("a", "b", annotator="x"),
        pair("a", "b", annotator="y"),
        pair("b", "a", annotator="x", margin=2),
        pair("a", "c", annotator="x"),
    ]
    rows.append({"prompt": "p", "completions": ["b", "a"], "ranking": [[0, 1]], "annotator": "x"})
    source = write("a.jsonl", rows)
    loaded = read_records(source, "preference")
    assert [int(r.location.rpartition(":")[2]) for r in loaded.records] == [2, 4, 5]
    [warning] = loaded.warnings
    assert "2 records by an annotator" in warning
    report = validate_source(source, "preference")
    assert (report.records, report.warnings) == (3, loaded.warnings)
    assert len(list(iter_records(source, "preference", on_skip=lambda skip: None))) == 5  # fmt: skip


def test_prompts_of_the_training_share_of_another_source_are_counted():
    def keys(*records) -> PromptKeys:
        found = PromptKeys()
        for record in records:
            found.add(record)
        return found

    everything, half = Split(0.0, 0), Split(0.5, 3)
    train = keys(PromptRecord("a"), PromptRecord("b"), PromptRecord("b"), PromptRecord((Message("user", "c"),)))
    assert keys(PromptRecord("d"), PromptRecord((Message("system", "c"),))).in_training_of(train, everything) == 0
    # One user turn is the same question as its text, whatever else the conversation holds.
    later = (Message("system", "x"), Message("user", " C"), Message("assistant", "y"), Message("user", "z"))
    for same in (PromptRecord("c"), PromptRecord(later)):
        assert keys(same, PromptRecord("d")).in_training_of(train, everything) == 1
    assert keys(Demonstration("b", "x"), PromptRecord("b"), PromptRecord("a")).in_training_of(train, everything) == 2
    assert keys(Demonstration("", "t")).in_training_of(keys(Demonstration("", "u")), everything) == 0
    assert keys(Demonstration("", "t")).in_training_of(keys(Demonstration("", "t")), everything) == 1
    assert keys().in_training_of(train, everything) == 0
    many = keys(*(PromptRecord(f"question {n}") for n in range(50)))
    assert many.in_training_of(many, half) == sum(not half.holds_out(f"question {n}") for n in range(50))


def test_hash_separates_its_parts():
    assert len({hash64("a", "bc"), hash64("ab", "c"), hash64("abc"), hash64("", "abc")}) == 4
