# ruff: noqa: E501  (tables of cases: a case a line)

from __future__ import annotations

import random

import pytest

from rlhf_cli.data.checks import RankingChecks, hash64, overlap_warning
from rlhf_cli.data.records import Demonstration, Message, PromptRecord, Ranking
from rlhf_cli.data.sources import iter_records, read_records, validate_source


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


def test_prompts_in_both_training_and_evaluation_are_counted(write):
    train = [PromptRecord("a"), PromptRecord("b"), PromptRecord("b"), PromptRecord((Message("user", "c"),))]
    assert overlap_warning(train, [PromptRecord((Message("system", "c"),)), PromptRecord("d")]) is None
    # One user turn is the same question as its text.
    assert "1 prompt" in (overlap_warning(train, [PromptRecord("c"), PromptRecord("d")]) or "")
    found = overlap_warning(
        train, [Demonstration("b", "x"), PromptRecord((Message("user", "c"),))], names=("one", "two")
    )
    assert found is not None
    assert found.startswith("2 prompts in both one and two")
    assert overlap_warning([Demonstration("", "t")], [Demonstration("", "u")]) is None
    assert overlap_warning([Demonstration("", "t")], [Demonstration("", "t")])
    one, two = (
        validate_source(write(n, [{"prompt": p} for p in t]), "prompt").prompts
        for n, t in (("a.jsonl", "ab"), ("b.jsonl", "bc"))
    )
    assert str(overlap_warning(one, two)).startswith("1 prompt in both training and evaluation")  # fmt: skip


def test_hash_separates_its_parts():
    assert len({hash64("a", "bc"), hash64("ab", "c"), hash64("abc"), hash64("", "abc")}) == 4
