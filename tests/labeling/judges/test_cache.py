"""Replies outlive kills, torn lines and damaged ones, and are found by all that they depend on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_cli.errors import DiskError
from rlhf_cli.labeling.judges.cache import ReplyCache, key_of
from rlhf_cli.labeling.judges.questions import Question
from rlhf_cli.labeling.judges.replies import UNHEARD, UNUSABLE, Reply

PAID = Reply(text="né [[A]] \ud800", prompt_tokens=10, completion_tokens=3, cost=0.25, is_cut=True)
LOCAL = Reply(chances=(0.1, 1 / 3), prompt_tokens=7)


def test_what_was_kept_is_there_again_to_the_last_bit(tmp_path: Path):
    cache = ReplyCache(tmp_path / "kept" / "label")
    cache.add([("a", PAID), ("b", LOCAL)])
    assert cache.spent == 0.25
    again = ReplyCache(tmp_path / "kept" / "label")
    assert (again.get("a"), again.get("b"), again.get("c")) == (PAID, LOCAL, None)
    assert again.spent == 0.25


def test_a_torn_last_line_is_asked_again_and_spoils_nothing_behind_it(tmp_path: Path, capsys):
    cache = ReplyCache(tmp_path)
    cache.add([("a", PAID)])
    cache.add([("b", PAID)])
    file = tmp_path / "verdicts.jsonl"
    whole = file.read_bytes()
    for size in range(whole.index(b"\n") + 1, len(whole)):
        file.write_bytes(whole[:size])
        torn = ReplyCache(tmp_path)
        assert torn.get("a") == PAID
        is_whole = size == len(whole) - 1  # only the end of the line lacks
        assert (torn.get("b") == PAID) is is_whole
        torn.add([("c", LOCAL)])
        again = ReplyCache(tmp_path)
        assert (again.get("a"), again.get("c")) == (PAID, LOCAL)
    assert "1 line is torn or damaged; these questions are asked again" in " ".join(capsys.readouterr().err.split())


def test_a_flipped_bit_does_not_become_a_verdict(tmp_path: Path):
    ReplyCache(tmp_path).add([("a", PAID), ("b", PAID), ("c", PAID)])
    file = tmp_path / "verdicts.jsonl"
    lines = file.read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b"[[A]]", b"[[B]]")
    file.write_bytes(b"\n".join(lines))
    cache = ReplyCache(tmp_path)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (PAID, None, PAID)


def test_several_processes_have_a_file_each_and_the_first_reads_all(tmp_path: Path):
    ReplyCache(tmp_path, 0).add([("a", PAID)])
    other = ReplyCache(tmp_path, 2)
    assert other.get("a") is None
    other.add([("b", LOCAL)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["verdicts-2.jsonl", "verdicts.jsonl"]
    assert ReplyCache(tmp_path).get("b") == LOCAL


def test_the_files_hold_plain_json(tmp_path: Path):
    ReplyCache(tmp_path).add([("a", PAID)])
    (line,) = (tmp_path / "verdicts.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "a"
    assert json.loads(line)["cost"] == 0.25


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot write verdicts to"):
        ReplyCache(tmp_path / "file" / "label")


def test_a_key_is_the_judge_and_every_word_of_the_question():
    question = Question(3, (0, 1), "instructions", "material")
    keys = {
        key_of(judge, asked)
        for judge in ("one", "other")
        for asked in (
            question,
            replace(question, instructions="instruction", material="smaterial"),
            replace(question, material="another"),
        )
    }
    assert len(keys) == 6
    assert key_of("one", question) == key_of("one", replace(question, item=5, shown=(1, 0)))


def test_what_gave_nothing_is_remembered_for_its_cost_alone(tmp_path: Path):
    unheard, unusable = Reply(failure=UNHEARD, cost=0.5), Reply(failure=UNUSABLE, cost=0.125)
    cache = ReplyCache(tmp_path)
    cache.add([("a", unheard), ("b", unusable), ("b", unusable), ("c", PAID), ("c", unheard), ("c", unusable)])
    for each in (cache, ReplyCache(tmp_path)):
        assert (each.get("a"), each.get("b"), each.get("c")) == (None, None, PAID)
        assert (each.spent, each.unheard, each.attempts_unheard) == (0.5 + 3 * 0.125 + 0.25 + 0.5, 1.0, 2)


def test_the_third_unusable_reply_stands_as_the_answer(tmp_path: Path):
    unusable = Reply(failure=UNUSABLE, cost=0.125)
    for count in range(3):
        cache = ReplyCache(tmp_path)
        assert cache.get("a") is None, count
        cache.add([("a", unusable)])
    assert cache.get("a") == ReplyCache(tmp_path).get("a") == unusable


def test_the_way_of_asking_is_in_the_key(monkeypatch):
    question = Question(3, (0, 1), "instructions", "material")
    before = key_of("one", question)
    monkeypatch.setattr("rlhf_cli.labeling.judges.cache.FORMAT", 0)
    assert key_of("one", question) != before
