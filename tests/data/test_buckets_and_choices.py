"""Label Studio's named buckets and Prodigy's choices: sets of completions whose order the user or the tool says."""

from __future__ import annotations

import json
import re

import pytest

from rlhf_cli.data.sources import read_records
from rlhf_cli.errors import DataError
from rlhf_cli.recipe.loader import load_recipe


@pytest.fixture
def read(write):
    def read_rows(*rows, kind="ranking", **options):
        return read_records(write("a.json", json.dumps(list(rows), indent=0)), kind, **options)

    return read_rows


def task(**buckets) -> dict:
    items = [{"id": name, "body": f"text {name}"} for name in "abc"]
    result = {"type": "ranker", "from_name": "rank", "to_name": "items", "value": {"ranker": buckets}}
    return {"data": {"prompt": "p", "items": items}, "annotations": [{"result": [result], "completed_by": 1}]}


def ranked(record) -> list[list[str]]:
    return [[record.completions[index] for index in tier] for tier in record.tiers]


def test_the_user_says_the_order_of_named_buckets(read):
    row = task(bad=["a"], good=["b", "c"])
    (record,) = read(row, columns={"ranking": ["good", "bad"]}).records
    assert ranked(record) == [["text b", "text c"], ["text a"]]


def test_the_hint_lists_the_buckets_and_works(read):
    row = task(_=[], relevant_results=["a"], **{"not so: good": ["b", "c"]})
    with pytest.raises(DataError) as caught:
        read(row)
    setting = re.search(r"--set '(.*?)'`", str(caught.value.hint))
    assert setting is not None
    columns = load_recipe(None, [setting[1]]).recipe.data.columns
    assert ranked(read(row, columns=columns).records[0]) == [["text a"], ["text b", "text c"]]


def test_a_bucket_that_is_not_listed_is_named_with_all(read):
    with pytest.raises(DataError, match="the bucket `worst`") as caught:
        read(task(good=["a"], worst=["b"]), columns={"ranking": ["good", "bad"]})
    assert "{ranking: [good, bad, worst]}" in str(caught.value.hint)


def test_completions_in_no_bucket_are_counted_and_the_others_ranked(read):
    loaded = read(task(_=["c"], **{"1": ["b"], "2": ["a"]}))
    assert ranked(loaded.records[0]) == [["text b"], ["text a"]]
    assert any("1 completion skipped: left unranked" in line for line in loaded.warnings)
    with pytest.raises(DataError, match="completions left unranked"):
        read(task(_=["b", "c"], **{"1": ["a"]}))


def choice(*accept: object, **fields) -> dict:
    options = [{"id": number, "text": f"text {number}"} for number in range(3)]
    return {"text": "p", "options": options, "accept": list(accept), "answer": "accept", "_view_id": "choice", **fields}


def rating(control: str, field: str, stars: int) -> dict:
    return {"type": "rating", "from_name": control, "to_name": field, "value": {"rating": stars}}


def test_a_completion_with_two_ratings_is_refused(read):
    results = [rating("helpful", "answer1", 5), rating("helpful", "answer2", 1)]
    row = {"data": {"prompt": "p", "answer1": "x", "answer2": "y"}, "annotations": [{"result": results}]}
    assert ranked(read(row).records[0]) == [["x"], ["y"]]
    results += [rating("brief", "answer1", 1), rating("brief", "answer2", 5)]
    with pytest.raises(DataError, match=r"rates `answer1` more than once: `helpful`, `brief`") as caught:
        read(row)
    assert caught.value.hint == "export one control at a time"


def test_an_id_that_two_options_share_is_refused(read):
    options = [{"id": 1, "text": "a"}, {"id": "1", "text": "b"}, {"id": 2, "text": "c"}]
    with pytest.raises(DataError, match='`options` has the id "1" twice'):
        read({"text": "p", "options": options, "accept": [2], "answer": "accept"})


def test_chosen_options_are_above_the_others(read):
    loaded = read(choice(1), choice(0, 2, _annotator_id="ada"))
    assert [ranked(record) for record in loaded.records] == [
        [["text 1"], ["text 0", "text 2"]],
        [["text 0", "text 2"], ["text 1"]],
    ]
    assert [(record.prompt, record.annotator) for record in loaded.records] == [("p", None), ("p", "ada")]
    assert any("a Prodigy choice task" in line for line in loaded.warnings)


def test_rejected_tasks_and_those_without_a_choice_are_counted(read):
    loaded = read(choice(1), choice(1, answer="reject"), choice(1, answer="ignore"), choice(), choice(0, 1, 2))
    assert len(loaded.records) == 1
    assert any("2 records skipped: not accepted by its annotator" in line for line in loaded.warnings)
    assert any("2 comparisons skipped: no verdict" in line for line in loaded.warnings)


def test_options_can_be_ranked_anew(read):
    loaded = read(choice(1), choice(), kind="candidates")
    assert [len(record.completions) for record in loaded.records] == [3]
    (record,) = read(choice(answer="ignore"), kind="candidates").records
    assert (record.completions, record.known) == (("text 0", "text 1", "text 2"), None)


def test_the_prompt_of_a_choice_may_be_elsewhere(read):
    row = {**choice(1), "input": {"text": "from input"}}
    assert read(row).records[0].prompt == "from input"
    row = {**choice(1), "question": "q"}
    assert read(row, columns={"prompt": "question"}).records[0].prompt == "q"


@pytest.mark.parametrize("accept", [["x"], "1", None])
def test_an_option_that_is_not_there_is_refused(read, accept):
    with pytest.raises(DataError, match="`accept` is") as caught:
        read({**choice(), "accept": accept})
    assert "list the ids" in str(caught.value.hint)
