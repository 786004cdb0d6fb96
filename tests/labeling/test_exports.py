"""Labels that go out and come back: the same bytes each time, the same rankings read again, what is lost said."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from rlhf_cli.cli.label import export as label_export
from rlhf_cli.cli.label import import_labels as label_import
from rlhf_cli.data.records import Message, Ranking
from rlhf_cli.data.sources import read_records
from rlhf_cli.errors import DataError, DiskError, UsageError
from rlhf_cli.labeling.aggregation import aggregate, group_of
from rlhf_cli.labeling.exports.formats import FORMATS, export_labels, export_rankings
from rlhf_cli.labeling.exports.pairs import pairs_of
from rlhf_cli.labeling.label_records import LabelRecord, read_labels, write_labels

FOUR = Ranking("p", ("a", "b", "c", "d"), ((2,), (0, 3), (1,)), annotator="ada")
TALK = (Message("system", "s"), Message("user", "q"), Message("assistant", "r"), Message("user", "q2"))

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda text: bool(text.strip()))
prompts_of = {
    "text": texts.filter(lambda text: "Assistant:" not in text),
    "talk": st.lists(texts, min_size=1, max_size=3).map(
        lambda said: tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate([*said, *said, "?"]))
    ),
}


def rankings_of(prompts) -> st.SearchStrategy[list[Ranking]]:
    answers = st.lists(texts, min_size=2, max_size=5, unique=True)

    def ranked(drawn) -> Ranking:
        prompt, completions, levels, annotator = drawn
        levels = levels[: len(completions)]
        tiers = tuple(tuple(i for i, own in enumerate(levels) if own == level) for level in sorted(set(levels)))
        return Ranking(prompt, tuple(completions), tiers, None, annotator)

    levels = st.lists(st.integers(0, 4), min_size=5, max_size=5)
    annotators = st.none() | texts.filter(lambda name: name != "None")
    row = st.tuples(prompts, answers, levels, annotators).map(ranked)
    return st.lists(row, min_size=1, max_size=4, unique_by=lambda one: (group_of(one), one.annotator))


def written(exported, path: Path) -> str:
    path.write_text("".join(exported.text()), encoding="utf-8", newline="")
    return str(path)


def same_answers(rankings) -> Counter:
    """Rankings without the order of answers within a tier and among each other."""
    return Counter(
        (one.prompt, one.completions, tuple(map(frozenset, one.tiers)), one.margin, one.annotator) for one in rankings
    )


# There and back


@pytest.mark.parametrize("kind", list(prompts_of))
@pytest.mark.parametrize("form", ["rankings", "label-studio", "argilla"])
def test_rankings_come_back_as_they_were(tmp_path, form, kind):
    @settings(max_examples=40, deadline=None)
    @given(rankings_of(prompts_of[kind]))
    def check(rankings):
        source = written(export_rankings(rankings, form), tmp_path / "out.json")
        back = read_records(source, "ranking", max_skip=0.0)
        assert same_answers(back.records) == same_answers(rankings)
        assert (tmp_path / "out.json").read_bytes() == "".join(export_rankings(rankings, form).text()).encode()

    check()


@pytest.mark.parametrize(
    ("form", "kind"),
    [("preferences", "text"), ("rewardbench", "text"), ("conversations", "talk")],
)
def test_pairs_come_back_as_they_were(tmp_path, form, kind):
    @settings(max_examples=40, deadline=None)
    @given(rankings_of(prompts_of[kind]))
    def check(rankings):
        expected = [(pair.ranking, pair.chosen, pair.rejected) for one in rankings for pair in pairs_of(one)]
        if expected:
            source = written(export_rankings(rankings, form), tmp_path / "out.jsonl")
            back = read_records(source, "preference", max_skip=0.0).records
            assert [(one.prompt, *one.completions, one.annotator) for one in back] == [
                (of.prompt, chosen, rejected, of.annotator) for of, chosen, rejected in expected
            ]

    check()


@settings(max_examples=40, deadline=None)
@given(rankings_of(prompts_of["text"]))
def test_pairs_are_all_but_the_ties(rankings):
    for ranking in rankings:
        level = ranking.levels()
        better = {(a, b) for a in range(len(level)) for b in range(len(level)) if level[a] < level[b]}
        assert [(pair.chosen, pair.rejected) for pair in pairs_of(ranking)] == [
            (ranking.completions[a], ranking.completions[b])
            for a, b in sorted(better, key=lambda pair: (level[pair[0]], level[pair[1]], *pair))
        ]


# By hand


def test_preferences_keep_group_and_annotator():
    rows = export_rankings([FOUR], "preferences").rows
    assert [(row["chosen"], row["rejected"]) for row in rows] == [
        ("c", "a"),
        ("c", "d"),
        ("c", "b"),
        ("a", "b"),
        ("d", "b"),
    ]
    assert {(row["prompt"], row["group"], row["annotator"]) for row in rows} == {("p", group_of(FOUR), "ada")}
    other = replace(FOUR, completions=("d", "c", "b", "a"), tiers=((0,), (1,), (2,), (3,)), annotator=None)
    assert {row["group"] for row in export_rankings([other], "preferences").rows} == {group_of(FOUR)}
    assert "annotator" not in export_rankings([other], "preferences").rows[0]


def test_conversations_are_messages():
    [row] = export_rankings([Ranking(TALK, ("a", "b"), ((1,), (0,)), 0.5)], "conversations").rows
    assert row == {
        "prompt": [{"role": m.role, "content": m.content} for m in TALK],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "a"}],
        "margin": 0.5,
        "group": row["group"],
    }
    [row] = export_rankings([Ranking("q", ("a", "b"), ((0,), (1,)))], "conversations").rows
    assert row["prompt"] == [{"role": "user", "content": "q"}]


def test_transcripts_become_messages():
    hh = "\n\nHuman: hi\nyou \n\nAssistant: yes?\n\nHuman: why\n\nAssistant:"
    exported = export_rankings([Ranking(hh, (" so", " not"), ((0,), (1,)))], "conversations")
    [row] = exported.rows
    assert [(turn["role"], turn["content"]) for turn in row["prompt"]] == [
        ("user", "hi\nyou"),
        ("assistant", "yes?"),
        ("user", "why"),
    ]
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("so", "not")
    assert any("1 prompts are transcripts" in line for line in exported.lost)
    for odd in (
        "\n\nAssistant:",
        "see\n\nHuman: a\n\nAssistant:",
        "\n\nHuman: a\n\nAssistant: b",
        "\n\nHuman:\n\nAssistant:",
    ):
        [row] = export_rankings([Ranking(odd, ("a", "b"), ((0,), (1,)))], "conversations").rows
        assert row["prompt"] == [{"role": "user", "content": odd}]


def test_plain_forms_take_one_question_and_refuse_conversations():
    question = Ranking((Message("user", "q"),), ("a", "b"), ((0,), (1,)))
    for form in ("preferences", "rewardbench"):
        assert export_rankings([question], form).rows[0]["prompt"] == "q"
        with pytest.raises(UsageError) as caught:
            export_rankings([replace(question, prompt=TALK)], form)
        assert "--format conversations" in str(caught.value.hint)


def test_margins_are_of_all_pairs_or_of_none():
    one, two = Ranking("p", ("a", "b"), ((0,), (1,)), 0.25), Ranking("q", ("a", "b"), ((1,), (0,)), 0.0)
    assert [row["margin"] for row in export_rankings([one, two], "preferences").rows] == [0.25, 0.0]
    exported = export_rankings([one, replace(two, margin=None)], "preferences")
    assert all("margin" not in row for row in exported.rows)
    assert any("1 of 2 pairs have a margin" in line for line in exported.lost)
    assert "margin" not in export_rankings([replace(FOUR, margin=1.0)], "preferences").rows[0]


def test_what_a_form_has_no_room_for_is_said():
    tie = Ranking("t", ("a", "b"), ((0, 1),))
    lost = export_rankings([FOUR, tie], "preferences").lost
    assert any("2 of 7 pairs are ties" in line for line in lost)
    assert any("1 of 2 rankings consist of one tie" in line for line in lost)
    for form in ("label-studio", "argilla"):
        assert any("1 margins" in line for line in export_rankings([replace(tie, margin=1.0), FOUR], form).lost)
        assert export_rankings([tie, FOUR], form).lost == []
    assert export_rankings([FOUR, tie], "rankings").lost == []


def test_answers_that_read_the_same_are_no_pair():
    """A model gave the same answer twice, and an annotator told them apart by their position."""
    ranking = Ranking("p", ("a", "b", "a"), ((0,), (1,), (2,)))
    assert [(pair.chosen, pair.rejected) for pair in pairs_of(ranking)] == [("a", "b"), ("b", "a")]


def test_label_studio_by_hand():
    other = Ranking("p", ("b", "a", "d", "c"), ((0,), (1,), (2,), (3,)), annotator="ben")
    exported = export_rankings([FOUR, other], "label-studio")
    [task] = exported.rows
    assert task["data"]["items"] == [{"id": str(n), "body": text} for n, text in enumerate("abcd", 1)]
    assert [a["completed_by"] for a in task["annotations"]] == [{"email": "ada"}, {"email": "ben"}]
    values = [a["result"][0]["value"]["ranker"] for a in task["annotations"]]
    assert values == [{"1": ["3"], "2": ["1", "4"], "3": ["2"]}, {"1": ["2"], "2": ["1"], "3": ["4"], "4": ["3"]}]
    strict = export_rankings([other], "label-studio").rows[0]["annotations"][0]["result"][0]
    assert strict["value"] == {"ranker": {"rank": ["1", "2", "3", "4"]}}
    assert (strict["from_name"], strict["to_name"], strict["type"]) == ("rank", "answers", "ranker")
    assert json.loads("".join(exported.text())) == exported.rows


def test_argilla_by_hand():
    [record] = export_rankings([FOUR], "argilla").rows
    assert record["fields"] == {
        "prompt": "p",
        "response-1": "a",
        "response-2": "b",
        "response-3": "c",
        "response-4": "d",
    }
    [response] = record["responses"]["ranking"]
    ranks = {one["value"]: one["rank"] for one in response["value"]}
    assert ranks == {"response-3": 1, "response-1": 2, "response-4": 2, "response-2": 3}
    assert (response["user_id"], response["status"]) == ("ada", "submitted")


def test_no_rankings_are_an_empty_file():
    for form in FORMATS:
        if form != "labels":
            text = "".join(export_rankings([], form).text())
            assert text == ("[]\n" if form in ("label-studio", "argilla") else "")


def test_labels_go_out_whole():
    ranked = LabelRecord(
        "i", "p", ("a", "b"), "ada", tiers=((1,), (0,)), shown=(1, 0), strength=2, marks={"kind": (1, None)}
    )
    labels = [
        ranked,
        replace(ranked, purpose="repeat"),
        replace(ranked, outcome="flagged", tiers=(), reason="rude\n\u2028", strength=None),
    ]
    text = "".join(export_labels(labels).text())
    assert len(text.split("\n")) == 4
    rankings = aggregate(labels, "individual")
    assert rankings == [Ranking("p", ("a", "b"), ((1,), (0,)), 1 / 3, "ada")]


# With the libraries that read them


@pytest.mark.parametrize("form", ["preferences", "conversations"])
def test_datasets_and_trl_take_both_forms_of_preferences(tmp_path, form):
    from datasets import load_dataset
    from trl.data_utils import is_conversational, maybe_extract_prompt

    rankings = [
        FOUR,
        Ranking("p2", ("a", "b"), ((1,), (0,))),
        replace(FOUR, annotator="ben\u2028", tiers=((0, 1), (2, 3))),
    ]
    source = written(export_rankings(rankings, form), tmp_path / "out.jsonl")
    data = load_dataset("json", data_files=source, cache_dir=str(tmp_path / "cache"), split="train")
    assert {"prompt", "chosen", "rejected"} <= set(data.column_names)
    assert len(data) == 5 + 1 + 4
    row = data[0]
    assert is_conversational({name: row[name] for name in ("prompt", "chosen", "rejected")}) == (
        form == "conversations"
    )
    assert maybe_extract_prompt(row)["prompt"] == row["prompt"]
    flat = [one["chosen"][0]["content"] if form == "conversations" else one["chosen"] for one in data]
    assert flat == ["c", "c", "c", "a", "d", "b", "a", "a", "b", "b"]


# The commands


@pytest.fixture
def command(tmp_path):
    app = typer.Typer()
    app.command("export")(label_export.export)
    app.command("import")(label_import.import_)

    def run(*arguments: object, error: type[BaseException] | None = None):
        result = CliRunner().invoke(app, list(map(str, arguments)))
        if error is None:
            assert result.exception is None, result.exception
        else:
            assert isinstance(result.exception, error), (result.exception, result.output)
        return result

    return run


@pytest.fixture
def labels(tmp_path) -> Path:
    path = tmp_path / "labels.jsonl"
    one = LabelRecord("i", "p", ("a", ""), "ada", tiers=((0,), (1,)), shown=(0, 1), note="né à 東京\u2028")
    skipped = replace(one, annotator="eve", outcome="skipped", tiers=())
    write_labels(path, [one, replace(one, annotator="ben"), replace(one, annotator="cy", tiers=((1,), (0,))), skipped])
    return path


def test_export_prints_data_and_nothing_else(command, labels):
    result = command("export", labels)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["annotator"] for row in rows] == ["ada", "ben", "cy"]
    [merged] = [json.loads(line) for line in command("export", labels, "--aggregation", "majority").stdout.splitlines()]
    assert merged == {"prompt": "p", "completions": ["a", ""], "ranking": [[0], [1]]}


def test_export_writes_the_whole_file_or_none(command, labels, tmp_path):
    out = tmp_path / "out.json"
    result = command("export", labels, "--format", "argilla", "--out", out, "--json")
    assert json.loads(result.stdout) == {"path": str(out), "format": "argilla", "labels": 3, "records": 1}
    before = out.read_bytes()
    assert command("export", labels, "--format", "argilla", "--out", out).stdout == f"{out}\n"
    assert out.read_bytes() == before
    command("export", labels, "--out", tmp_path / "nowhere" / "x", error=DiskError)
    (tmp_path / "folder").mkdir()
    command("export", labels, "--out", tmp_path / "folder", error=DiskError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "labels.jsonl", "out.json"]


def test_individual_labels_come_back(command, labels, tmp_path):
    out = tmp_path / "again.jsonl"
    command("export", labels, "--format", "labels", "--out", out)
    assert out.read_bytes() == labels.read_bytes()
    assert list(read_labels(out)) == list(read_labels(labels))


def test_export_takes_a_run_directory_with_labels_or_with_rankings(command, labels, tmp_path):
    folder = tmp_path / "run" / "label"
    folder.mkdir(parents=True)
    (folder / "rankings.jsonl").write_text('{"prompt": "p", "completions": ["x", ""], "ranking": [[0], [1]]}\n')
    assert json.loads(command("export", tmp_path / "run").stdout)["completions"] == ["x", ""]
    command("export", tmp_path / "run", "--format", "labels", error=UsageError)
    (folder / "labels.jsonl").write_bytes(labels.read_bytes())
    # What the reward model learns from, unless individual labels are asked for or merged anew.
    assert json.loads(command("export", tmp_path / "run").stdout)["completions"] == ["x", ""]
    assert command("export", tmp_path / "run", "--format", "labels").stdout == labels.read_text()
    merged = command("export", tmp_path / "run", "--aggregation", "majority").stdout.splitlines()
    assert len(merged) == len({json.loads(line)["prompt"] for line in merged})
    assert json.loads(merged[0])["completions"] != ["x", ""]


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["--format", "ranking"], "did you mean `rankings`"),
        (["--aggregation", "mean"], "unknown value `--aggregation mean`"),
        (["--format", "labels", "--aggregation", "majority"], "`--aggregation` has no effect"),
        (["--json"], "the data goes to stdout"),
    ],
)
def test_export_refuses_what_it_cannot_do(command, labels, arguments, piece):
    assert piece in str(command("export", labels, *arguments, error=UsageError).exception)


def test_import_turns_any_form_into_rankings(command, labels, tmp_path):
    out, sides = tmp_path / "rankings.jsonl", tmp_path / "sides.json"
    row = {"data": {"asked": "p", "a1": "x", "a2": "y", "topic": "t"}, "annotations": [{"result": [{}]}]}
    row["annotations"][0]["result"][0] = {"type": "pairwise", "value": {"selected": "right"}}
    sides.write_text(json.dumps([row]))
    command("import", sides, "--out", out, error=DataError)
    assert not out.exists()
    result = command("import", sides, "--set", "data.columns={prompt: asked}", "--out", out, "--json")
    assert json.loads(result.stdout) == {"path": str(out), "rankings": 1, "completions": 2, "skipped": {}}
    assert json.loads(out.read_text()) == {"prompt": "p", "completions": ["y", "x"], "ranking": [[0], [1]]}
    assert command("import", sides, "--set", "data.columns={prompt: asked}").stdout == out.read_text()
    refused = command("import", sides, "--set", "ppo.steps=3", error=UsageError)
    assert "`--set ppo.steps=3` has no effect" in str(refused.exception)


def test_import_counts_what_it_skips(command, tmp_path):
    source = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "p", "chosen": "a", "rejected": other} for other in ("b", "a")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command("import", source, error=DataError)
    result = command("import", source, "--max-skip", "0.5", "--out", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["skipped"] == {"chosen equal to rejected": 1}


def test_the_real_commands(rlhf, labels, tmp_path):
    merged = rlhf(
        "label", "export", labels, "--aggregation", "bradley-terry", "--format", "label-studio", "--out", "tasks.json"
    )
    assert merged.stdout == "tasks.json\n"
    back = rlhf("label", "import", "tasks.json", code=65)
    assert "none of its 1 records can be used (1 empty completion)" in back.stderr


@pytest.mark.real
@pytest.mark.parametrize("form", ["label-studio", "argilla"])
def test_real_rankings_there_and_back(shared_data, tmp_path, form):
    rankings = read_records(str(shared_data / "qa_rankings.jsonl"), "ranking").records
    back = read_records(written(export_rankings(rankings, form), tmp_path / "out.json"), "ranking").records
    assert back == rankings


@pytest.mark.real
def test_real_trees_become_conversations(shared_data, tmp_path):
    rankings = read_records(str(shared_data / "oasst_trees.jsonl"), "ranking").records
    exported = export_rankings(rankings, "conversations")
    assert len(exported.rows) == 754
    back = read_records(written(exported, tmp_path / "out.jsonl"), "preference").records
    assert len(back) == 754
    assert {row.prompt for row in back} == {row.prompt for row in rankings}
