"""Rows of one completion and a rating: those of one prompt become a ranking, the others are counted."""

from __future__ import annotations

import json

import pytest

from rlhf_cli.data.sources import read_records, validate_source
from rlhf_cli.errors import DataError
from rlhf_cli.settings.comparison import ComparisonSettings


def row(prompt, completion, **rating):
    return {"prompt": prompt, "completion": completion, **rating}


KTO = [
    row("egg", "good", label=True),
    row("sky", "blue", label=True),
    row("egg", "bad", label=False),
    row("sky", "green", label=False),
    row("sky", "azure", label=True),
    row("map", "folded", label=True),
]


def ranked(loaded) -> list[tuple[str, list[list[str]]]]:
    return [(one.prompt, [[one.completions[index] for index in tier] for tier in one.tiers]) for one in loaded.records]


@pytest.mark.parametrize("kind", ["ranking", "preference"])
def test_good_and_bad_completions_of_a_prompt_are_a_ranking_wherever_they_are(write, kind):
    loaded = read_records(write("kto.jsonl", KTO), kind)
    assert ranked(loaded) == [("egg", [["good"], ["bad"]]), ("sky", [["blue", "azure"], ["green"]])]
    assert loaded.total == 2
    said = "\n".join(loaded.warnings)
    assert "read as rated completions: prompt, completion, label, in 6 records" in said
    assert "1 rated completion skipped: no other completion of the same prompt is rated better or worse" in said


def test_tables_write_labels_as_text_and_columns_may_have_other_names(write):
    path = write("kto.csv", "q,completion,label\negg,good,True\negg,bad,FALSE\nsky,blue,1\nsky,green,0\n")
    loaded = read_records(path, "ranking", columns={"prompt": "q"})
    assert ranked(loaded) == [("egg", [["good"], ["bad"]]), ("sky", [["blue"], ["green"]])]


def test_scores_of_several_completions_are_an_order_with_ties(write):
    rows = [
        {"prompt": "egg", "response": text, "helpfulness": n, "verbosity": 1}
        for text, n in zip("abcd", (4, 1, 4, 2), strict=True)
    ]
    loaded = read_records(write("helpsteer.jsonl", rows), "ranking")
    assert ranked(loaded) == [("egg", [["a", "c"], ["d"], ["b"]])]


def test_a_completion_that_was_rated_twice_has_its_mean(write):
    rows = [row("egg", "a", score=1), row("egg", "b", score=2), row("egg", "a", score=5)]
    assert ranked(read_records(write("twice.jsonl", rows), "ranking")) == [("egg", [["a"], ["b"]])]


def test_annotators_and_system_messages_are_kept_apart(write):
    rows = [
        row("egg", "a", label=True, annotator="ada"),
        row("egg", "b", label=False, annotator="bob"),
        row("egg", "c", label=False, annotator="ada"),
    ]
    (ranking,) = read_records(write("two.jsonl", rows), "ranking").records
    assert (ranking.annotator, ranking.completions) == ("ada", ("a", "c"))
    rows = [row("egg", "a", label=True, system="x"), row("egg", "b", label=False, system="y")]
    rows += [row("egg", "c", label=False, system="x")]
    (ranking,) = read_records(write("system.jsonl", rows), "ranking").records
    assert (ranking.prompt[0].content, ranking.completions) == ("x", ("a", "c"))


@pytest.mark.parametrize("split", [True, False], ids=["prompt and completion", "messages"])
def test_conversations_are_grouped_too(write, split):
    def turns(text, label):
        asked, reply = [{"role": "user", "content": "egg"}], [{"role": "assistant", "content": text}]
        fields = {"prompt": asked, "completion": reply} if split else {"messages": asked + reply}
        return {**fields, "label": label}

    (ranking,) = read_records(write("c.jsonl", [turns("a", False), turns("b", True)]), "ranking").records
    assert (ranking.completions, ranking.tiers) == (("a", "b"), ((1,), (0,)))
    assert ranking.prompt[0].content == "egg"


def test_completions_to_be_ranked_need_no_difference(write):
    rows = [row("egg", "a", label=True), row("egg", "b", label=True)]
    path = write("same.jsonl", rows)
    assert read_records(path, "candidates").records[0].completions == ("a", "b")
    with pytest.raises(DataError, match=r"no usable records.*2 rated completions skipped") as caught:
        read_records(path, "ranking")
    assert "rated better and one rated worse" in str(caught.value.hint)


def test_a_row_without_a_rating_is_counted_and_a_wrong_one_is_an_error(write):
    rows = [*KTO, row("egg", "c", label=None)]
    assert any(
        "1 comparison skipped: no verdict" in line for line in read_records(write("n.jsonl", rows), "ranking").warnings
    )
    with pytest.raises(DataError, match=r"w.jsonl:7: `label` is \"maybe\"") as caught:
        read_records(write("w.jsonl", [*KTO, row("egg", "c", label="maybe")]), "ranking")
    assert caught.value.hint == "write true or false"
    with pytest.raises(DataError, match=r"`score` is .* a finite number is expected"):
        read_records(write("s.jsonl", [row("egg", "c", score="many")]), "ranking")


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        (None, "`completion` is null"),
        (7, "`completion` is 7, a number"),
        ([{"role": "user", "content": "x"}], "mixed: `prompt` is a string and `completion` is a list of messages"),
        ("", "empty completion"),
    ],
)
def test_a_wrong_completion_is_skipped_alone_and_named_by_its_own_row(write, completion, said):
    loaded = read_records(write("w.jsonl", [*KTO, row("egg", completion, label=False)]), "ranking", max_skip=0.5)
    assert ranked(loaded) == [("egg", [["good"], ["bad"]]), ("sky", [["blue", "azure"], ["green"]])]
    (skip,) = loaded.skips
    assert skip.location.endswith("w.jsonl:7")
    assert said in str(skip.error or skip.reason)


def test_a_wrong_prompt_is_an_error_of_its_row(write):
    rows = [*KTO, row(None, "a", label=True), row(None, "b", label=False)]
    with pytest.raises(DataError, match=r"w.jsonl:7: `prompt` is null"):
        read_records(write("w.jsonl", rows), "ranking")


def test_demonstrations_and_prompts_are_read_row_by_row(write):
    path = write("kto.jsonl", KTO)
    assert len(read_records(path, "demonstration").records) == 4
    assert len(read_records(path, "prompt").records) == 6


def test_what_the_user_describes_is_read_so(write):
    rows = [{"prompt": "egg", "completion": "a", "label": "b", "other": "c"}]
    how = ComparisonSettings(completions=["completion", "other"], read_as="order")
    assert ranked(read_records(write("d.jsonl", rows), "ranking", comparison=how)) == [("egg", [["a"], ["c"]])]


def test_validation_counts_the_same(write):
    report = validate_source(write("kto.jsonl", KTO), "ranking")
    assert report.records == 2
    assert json.dumps(report.warnings).count("rated completion") == 2
