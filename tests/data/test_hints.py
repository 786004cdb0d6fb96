"""Every hint of a data error works: a file that causes the error is read once the hint is followed.

A hint with `--set` is applied as it is printed. What another hint asks for is the second file of a case. The last test
finds the errors of `rlhf_cli/data` that no case causes.
"""

# ruff: noqa: E501  (tables of cases: a case a line)

from __future__ import annotations

import ast
import gzip
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rlhf_cli.data.sources import read_records
from rlhf_cli.errors import RLHFError
from rlhf_cli.recipe.loader import load_recipe
from tests.data.test_formats import ask as asks
from tests.data.test_formats import pairwise, ranker, ranks, record, task, tree

DATA = Path(__file__).resolve().parents[2] / "rlhf_cli" / "data"
U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
B = {"role": "assistant", "content": "b"}


class Case(NamedTuple):
    """A file with an error, and what the hint makes of it.

    Attributes:
        hint: a piece of the hint.
        wrong: rows, or the content of the file.
        fixed: the same as the hint says; None if the hint has a setting.
        kind: of the records, or kinds before and after.
        name: of the file, or names before and after.
        settings: of `data` that cause the error.
        then: of `data`, as the hint says.
        meant: what stands for NAME in a setting.
    """

    hint: str
    wrong: Any
    fixed: Any = None
    kind: str = "ranking"
    name: str = "a.jsonl"
    settings: tuple[str, ...] = ()
    then: tuple[str, ...] = ()
    meant: str = ""


def p(**fields):
    return [{"prompt": "q", **fields}]


def pair(**fields):
    return p(chosen="a", rejected="b", **fields)


def k(**fields):
    return p(completions=["a", "b"], **fields)


def demo(**fields):
    return p(completion="a", **fields)


GOOD = [{"prompt": "q", "completion": "a"}]
LINE = json.dumps(GOOD[0]) + "\n"
RANKED = k(ranking=[[1], [0]])
D = "demonstration"
TREE = tree(
    asks(
        "q",
        {"role": "assistant", "text": "a", "rank": 0, "replies": []},
        {"role": "assistant", "text": "b", "rank": 1, "replies": []},
    )
)
TIERS = "tiers, best first"


def compared(**fields):
    return p(response_a="a", response_b="b", **fields)


def comparison(text: str) -> tuple[str, ...]:
    return (f"data.comparison={{{text}}}",)


def rated(**stars):
    """A task of Label Studio: control -> stars of `answer1` and `answer2`."""
    results = [
        {"type": "rating", "from_name": control, "to_name": f"answer{place}", "value": {"rating": one}}
        for control, given in stars.items()
        for place, one in enumerate(given, 1)
    ]
    return {"data": {"prompt": "q", "answer1": "a", "answer2": "b"}, "annotations": [{"result": results}]}


CASES = {
    # Fields
    "other names": Case("data.columns={prompt: question, completion: answer}", [{"question": "q", "answer": "a"}], kind=D),
    "other names of a pair": Case("data.columns={chosen: better, rejected: worse}", p(better="a", worse="b")),
    "a preference for sft": Case("data.columns={completion: chosen}", pair(), kind=D),
    "a demonstration for train-rm": Case("give it to `sft`", GOOD, GOOD, kind="ranking demonstration"),
    "completions without a ranking": Case("as `label.items`", k(), k(), kind="ranking candidates"),
    "prompts for sft": Case("records with prompts only are for", p(), p(), kind="demonstration prompt"),
    "one unknown name": Case("data.columns={prompt: frage}", [{"frage": "q", "id": 1}], kind="prompt"),
    "unknown names": Case("data.columns={prompt: NAME}", [{"x": "q", "y": "a"}], kind="prompt", meant="x"),
    "nothing known": Case("a demonstration record has the fields", [{"x": "q", "y": "a"}], GOOD, kind=D),
    "a field that is none": Case("ours is one of", GOOD, GOOD, kind=D, settings=("data.columns={promt: question}",), then=("data.columns={prompt: prompt}",)),
    "joined columns": Case("write it as text", [{"a": ["x"], "b": "y", "completion": "c"}], [{"a": "x", "b": "y", "completion": "c"}], kind=D, settings=("data.columns={prompt: [a, b]}",), then=("data.columns={prompt: [a, b]}",)),
    "two prompts": Case("data.columns={prompt: [input, question]}", [{"question": "q", "input": "i", "chosen": "a", "rejected": "b"}]),
    "system twice": Case("keep one of these columns", demo(system="x", system_prompt="y"), demo(system="x"), kind=D),
    "system twice in messages": Case("keep one", [{"messages": [{"role": "system", "content": "x"}, U, A], "system": "y"}], [{"messages": [{"role": "system", "content": "x"}, U, A]}], kind=D),
    # Prompts and conversations
    "a prompt that ends with a reply": Case("name the whole conversation `messages`", [{"prompt": [U, A]}], [{"messages": [U, A]}], kind="prompt"),
    "the assistant begins": Case("put the user's message before it", [{"messages": [A]}], [{"messages": [U, A]}], kind=D),
    "a conversation without a prompt": Case("begin with a user message", [{"messages": [A]}], [{"messages": [U, A]}], kind="prompt"),
    "a reply as messages": Case("give both as strings or both as messages", p(completion=[A]), GOOD, kind=D),
    "a reply of two turns": Case("put the turns before it into `prompt`", [{"prompt": [U], "completion": [A, U]}], [{"prompt": [U], "completion": [A]}], kind=D),
    "strings and messages": Case("the same style", [*GOOD, {"prompt": [U], "completion": [A]}], GOOD, kind=D),
    "null": Case("give `completion` a text", p(completion=None), GOOD, kind=D),
    "a number": Case("put text in double quotes", p(completion=3), p(completion="3"), kind=D),
    "an object": Case("data.columns={ours: yours}", p(completion={"x": 1}, answer="a"), kind=D, meant="{completion: answer}"),
    "messages null": Case("give `messages` messages", [{"messages": None}], [{"messages": [U, A]}], kind=D),
    "messages text": Case('[{"role": "user", "content": "…"}', [{"messages": "hello"}], [{"messages": [U, A]}], kind=D),
    "no messages": Case("at least one message", [{"messages": []}], [{"messages": [U, A]}], kind=D),
    "a turn of text": Case("a message is", [{"messages": ["q", "a"]}], [{"messages": [U, A]}], kind=D),
    "a turn without role": Case("a message is", [{"messages": [{"content": "q"}, A]}], [{"messages": [U, A]}], kind=D),
    "a role": Case("roles are", [{"messages": [{"role": "usr", "content": "q"}, A]}], [{"messages": [U, A]}], kind=D),
    "half an emoji": Case("cut inside an emoji", '{"prompt": "q", "completion": "\\ud83d"}\n', GOOD, kind=D),
    "python in a cell": Case("to_json", "messages\n\"[{'role': 'user', 'content': 'q'}, ..., {'role': 'user', 'content': 'q'}]\"\n", [{"messages": [U, A]}], kind=D, name="a.csv a.jsonl"),
    "python as a completion": Case("to_json", p(completion="array([{'role': 'assistant', 'content': 'a'}], dtype=object)"), GOOD, kind=D),
    "json cut off": Case("32,767 characters", p(completion='[{"role": "assistant", "content": "a'), GOOD, kind=D),
    "no json in a cell": Case("lists in CSV are written as JSON", "prompt,completions,ranking\nq,a or b,\"[[0],[1]]\"\n", 'prompt,completions,ranking\nq,"[""a"",""b""]","[[0],[1]]"\n', name="a.csv"),
    # Comparisons of ours
    "one completion": Case('["one completion", "another"]', p(completions=["a"], ranking=[[0]]), RANKED),
    "one of two in messages": Case("give both in the same style", p(chosen="a", rejected=[B]), pair()),
    "an empty list": Case("one or more texts", p(chosen=["a"], rejected=[]), p(chosen=["a"], rejected=["b"])),
    "a ranking that is no list": Case(TIERS, k(ranking=[1, 0]), RANKED),
    "an index that is none": Case(TIERS, k(ranking=[["1"], [0]]), RANKED),
    "an index too high": Case(TIERS, k(ranking=[[2], [0]]), RANKED),
    "an index twice": Case(TIERS, k(ranking=[[1], [1]]), RANKED),
    "an index missing": Case(TIERS, k(ranking=[[1]]), RANKED),
    "a margin": Case("remove `margin`", pair(margin="much"), pair()),
    "a subset": Case("remove `subset`", k(subset=[1]), k(), kind="candidates"),
    "a reference": Case("leave it empty", '{"prompt": "q", "reference": NaN}\n', p(reference=None), kind="prompt"),
    # Verdicts
    "a winner that is not clear": Case("say what each value means", compared(winner="7"), settings=comparison("completions: [response_a, response_b], verdict: winner")),
    "an absent column": Case("name a column, or a path", compared(winner="a"), compared(winner="a"), settings=comparison("completions: [response_a, response_b], verdict: who"), then=comparison("completions: [response_a, response_b], verdict: winner")),
    "a list of one": Case("name two columns", p(texts=["a"], response_a="a", response_b="b", winner="a"), p(texts=["a"], response_a="a", response_b="b", winner="a"), settings=comparison("completions: ['texts[]'], verdict: winner"), then=comparison("completions: [response_a, response_b], verdict: winner")),
    "turns that do not fit": Case("complete them", [{"prompt": ["q", "r"], "response_a": ["x"], "response_b": ["x", "b"], "winner": "a"}], [{"prompt": ["q", "r"], "response_a": ["x", "a"], "response_b": ["x", "b"], "winner": "a"}]),
    "a strength of three": Case("a strength compares two", p(x="a", y="b", z="c", s=1), p(x="a", y="b", z="c", s=1), settings=comparison("completions: [x, y, z], verdict: s, read_as: strength"), then=comparison("completions: [x, y], verdict: s, read_as: strength")),
    "a score missing": Case("give one per completion", k(scores=[1]), k(scores=[1, 2])),
    "a score that is no number": Case("leave it empty where it is unknown", [*k(scores=["x", 2]), *k(scores=[1, 2])], [*k(scores=["", 2]), *k(scores=[1, 2])]),
    "a label that is none": Case("write true or false", [*demo(label="maybe"), *p(completion="b", label=False)], [*demo(label=True), *p(completion="b", label=False)]),
    "rated alike": Case("rated better", demo(label=True), [*demo(label=True), *p(completion="b", label=False)]),
    # Other tools
    "of two tools": Case("remove the fields of the one", [task(ranker({"rank": ["a", "b", "c"]})) | record({})], [task(ranker({"rank": ["a", "b", "c"]}))]),
    "one message of a tree": Case("whole trees", [{"message_id": "m", "parent_id": None, "text": "q", "role": "prompter"}], [TREE]),
    "a ranker of text": Case('{"rank": ["b", "a"]}', [task(ranker({"rank": "abc"}))], [task(ranker({"rank": ["a", "b", "c"]}))]),
    "named buckets": Case("data.columns={ranking: [good, bad]}", [task(ranker({"good": ["a"], "bad": ["b", "c"]}))]),
    "a bucket that is not listed": Case("data.columns={ranking: [good, bad]}", [task(ranker({"good": ["a"], "bad": ["b", "c"]}))], settings=("data.columns={ranking: [good]}",)),
    "two rankers": Case("export one control at a time", [task({"result": [*ranker({"rank": ["a", "b", "c"]})["result"]] * 2})], [task(ranker({"rank": ["a", "b", "c"]}))]),
    "no items": Case('"items": [{"id": "a"', [task(ranker({"rank": ["a", "b"]}), items=[])], [task(ranker({"rank": ["a", "b", "c"]}))]),
    "three fields side by side": Case("name them alike", [pairwise(data={"answer3": "x"})], [pairwise()]),
    "no prompt of a task": Case("data.columns={prompt: NAME}", [pairwise(data={"prompt": None, "one": "q", "two": "r"})], meant="one"),
    "two questions of a record": Case("data.columns={ranking: NAME}", [record({name: [{"value": ranks(1, 2, 3)}] for name in ("x", "y")})], meant="y"),
    "fields that are not alike": Case("response-1", [{"fields": {"prompt": "q", "left one": "a", "the other": "b"}, "responses": {}}], [{"fields": {"prompt": "q", "response-1": "a", "response-2": "b"}, "responses": {}}], kind="candidates"),
    "an option twice": Case("its own id", [{"text": "q", "options": [{"id": 1, "text": "a"}, {"id": 1, "text": "b"}], "accept": [1]}], [{"text": "q", "options": [{"id": 1, "text": "a"}, {"id": 2, "text": "b"}], "accept": [1]}]),
    "two ratings of a completion": Case("one control at a time", [rated(helpful=(5, 1), brief=(1, 5))], [rated(helpful=(5, 1))]),
    "an option that is not there": Case("list the ids", [{"text": "q", "options": [{"id": 1, "text": "a"}, {"id": 2, "text": "b"}], "accept": [3]}], [{"text": "q", "options": [{"id": 1, "text": "a"}, {"id": 2, "text": "b"}], "accept": [2]}]),
    # JSON
    "nested": Case("text, numbers, lists and messages", "[" * 100_000 + "\n", GOOD, kind=D),
    "a number a line": Case("per line", "3\n", GOOD, kind=D),
    "a field twice": Case("keep one of them", '{"prompt": "q", "prompt": "r", "completion": "a"}\n', GOOD, kind=D),
    "a long number": Case("as text", '{"prompt": "q", "completion": "a", "n": ' + "1" * 5000 + "}\n", '{"prompt": "q", "completion": "a", "n": "' + "1" * 5000 + '"}\n', kind=D),
    "python lines": Case("json.dumps", "{'prompt': 'q', 'completion': 'a'}\n", GOOD, kind=D),
    "a line cut off": Case("delete the last line", LINE + LINE[:20], LINE, kind=D),
    "a line with a fault": Case("fix the line by hand", '{"prompt" "q"}\n', GOOD, kind=D),
    "an array without commas": Case("separated by commas", f"[{LINE}{LINE}]", f"[{LINE},{LINE}]", kind=D, name="a.json"),
    "an array cut off": Case("copy the file again", f"[{LINE}", f"[{LINE}]", kind=D, name="a.json"),
    "an array cut off after a comma": Case("copy the file again", f"[{LINE},", f"[{LINE}]", kind=D, name="a.json"),
    "text behind an array": Case("one array per file", f"[{LINE}][{LINE}]", f"[{LINE}]", kind=D, name="a.json"),
    "a last comma": Case("delete the comma", f"[{LINE},]", f"[{LINE}]", kind=D, name="a.json"),
    "cells of the viewer": Case("name the data set itself", json.dumps({"rows": [{"row_idx": 0, "row": GOOD[0], "truncated_cells": ["x"]}]}), GOOD, kind=D, name="a.json a.jsonl"),
    # Tables
    "cells too many": Case("in double quotes", "prompt,completion\nq,a,b\n", 'prompt,completion\nq,"a,b"\n', kind=D, name="a.csv"),
    "an open quote": Case("close it", 'prompt,completion\nq,"a" b\n', 'prompt,completion\nq,"a"" b"\n', kind=D, name="a.csv"),
    "a column twice": Case("rename one", "prompt,prompt\nq,a\n", "prompt,completion\nq,a\n", kind=D, name="a.csv"),
    "line ends mixed": Case("save the file again", "prompt,completion\nq,a\rq,b\n", "prompt,completion\nq,a\nq,b\n", kind=D, name="a.csv"),
    "a table in txt": Case("name it .csv", "prompt,completion\nq,a\n", "prompt,completion\nq,a\n", kind="prompt", name="a.txt a.csv"),
    "no parquet": Case("download the file again", b"PAR1" + b"x" * 30, GOOD, kind=D, name="a.parquet a.jsonl"),
    # Files
    "a pointer": Case("git lfs pull", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", GOOD, kind=D),
    "a page": Case("open the file in a browser", "<!doctype html><html>", GOOD, kind=D),
    "zero bytes": Case("can be read", b"\x01\x00\x02\x03\x00" * 9, GOOD, kind=D),
    "packed otherwise": Case("unpack it first", b"PK\x03\x04xxxx", GOOD, kind=D),
    "gzip cut off": Case("copy or download it again", gzip.compress(LINE.encode() * 99)[:-20], gzip.compress(LINE.encode()), kind=D, name="a.jsonl.gz"),
    "no UTF-8": Case("iconv -f CP1252 -t UTF-8", '{"prompt": "é", "completion": "a"}\n'.encode("cp1252"), '{"prompt": "é", "completion": "a"}\n', kind=D),
    "no UTF-16": Case("save it as UTF-8", LINE.encode("utf-16") + b"\x00", LINE, kind=D),
    "empty": Case("check the program", "\n", GOOD, kind=D),
    "empty parquet": Case("check the program", b"", GOOD, kind=D, name="a.parquet a.jsonl"),
    "another ending": Case("rename it to end in .jsonl", LINE, LINE, kind=D, name="a.data a.jsonl"),
    # Shares
    "too many skipped": Case("data.max_skip=", [*GOOD, *p(completion="")], kind=D),
    "all skipped": Case("fix the records", p(completion=""), GOOD, kind=D),
}  # fmt: skip


def of_two(text: str) -> tuple[str, str]:
    first, _, second = text.partition(" ")
    return first, second or first


def settings_of(hint: str, meant: str) -> list[str]:
    """The first setting that a hint prints, with what the user fills in."""
    found = re.search(r"--set '(.*?)'(?:`|$)|--set (\S+?)(?:`|$)", hint)
    assert found is not None, hint
    setting = (found[1] or found[2]).replace("NAME", meant)
    return [setting.replace("{ours: yours}", meant)]


def attempt(write, name: str, content: Any, kind: Any, settings: list[str]):
    data = load_recipe(None, settings).recipe.data
    options = {"columns": data.columns, "comparison": data.comparison, "max_skip": data.max_skip}
    return read_records(write(name, content), kind, **options)


def error_of(write, case: Case) -> RLHFError:
    with pytest.raises(RLHFError) as caught:
        attempt(write, of_two(case.name)[0], case.wrong, of_two(case.kind)[0], list(case.settings))
    return caught.value


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_hint_works_on_what_caused_it(write, case):
    hint = str(error_of(write, case).hint)
    assert case.hint in hint
    settings = settings_of(hint, case.meant) if case.fixed is None else list(case.then)
    content = case.wrong if case.fixed is None else case.fixed
    loaded = attempt(write, of_two(case.name)[1], content, of_two(case.kind)[1], settings)
    assert loaded.records


# Completeness

ELSEWHERE = {
    "the record is longer than": "needs a record of 64 MiB",
    "the line is longer than": "needs a line of 64 MiB",
    "cannot be read": "permissions, which root does not need: tests/data/test_origins.py",
    "the data set cannot be loaded from the hub": "tests/data/test_origins.py",
    "is a directory without data files": "tests/data/test_origins.py",
    "not a regular file": "tests/data/test_origins.py",
    "was written by `save_to_disk`": "tests/data/test_origins.py",
    "no file of the split": "tests/data/test_origins.py",
    "has the splits": "tests/data/test_origins.py",
    "no such file or folder": "tests/data/test_origins.py",
    "several sheets hold rows": "tests/data/test_real_files.py",
    "cannot be read as a spreadsheet": "tests/data/test_real_files.py",
    "reading spreadsheets needs a package": "tests/data/test_real_files.py",
    "occurs twice": "of a spreadsheet: tests/data/test_real_files.py; of other tables there is a case",
    "not CSV:": "what the `csv` module may still refuse",
    "which holds no": "the hint is a command: the test below runs it",
    "none are left to train on": "of a split: tests/data/test_splits.py",
    ": the turns ": "passes the hint of a chat template on: tests/data/test_chat_format.py",
    "records would be skipped": "passes the hint of the first record on",
}
"""Errors that no case causes, by a piece of their message -> why."""


def messages_with_hints() -> dict[str, str]:
    """Location -> regular expression of the message, of each error with a hint that `rlhf_cli/data` raises."""
    found = {}
    for path in sorted(DATA.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            has_hint = len(node.args) > 1 or any(keyword.arg == "hint" for keyword in node.keywords)
            if name in ("error", "DataError", "UsageError") and has_hint:
                found[f"{path.name}:{node.lineno}"] = _pattern(node.args[0])
    return found


def _pattern(message: ast.expr) -> str:
    if isinstance(message, ast.Constant):
        return re.escape(str(message.value))
    if isinstance(message, ast.JoinedStr):
        return "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".*" for part in message.values)
    if isinstance(message, ast.BinOp):
        return _pattern(message.left) + _pattern(message.right)
    return ".*"


def test_every_error_with_a_hint_has_a_case(write):
    said = [error_of(write, case).message for case in CASES.values()]
    missing = {
        where: pattern
        for where, pattern in messages_with_hints().items()
        if not any(re.search(pattern, message, re.DOTALL) for message in said)
        and not any(re.escape(piece) in pattern for piece in ELSEWHERE)
    }
    assert missing == {}


def test_the_hint_to_import_first_works(write, rlhf_here, tmp_path):
    source = write("task.json", [task(ranker({"rank": ["a", "b", "c"]}))])
    with pytest.raises(RLHFError) as caught:
        read_records(source, "prompt")
    assert "`rlhf label import FILE --out rankings.jsonl`" in str(caught.value.hint)
    code, said = rlhf_here("label", "import", source, "--out", "rankings.jsonl")
    assert code == 0, said
    assert read_records(str(tmp_path / "rankings.jsonl"), "prompt").records
