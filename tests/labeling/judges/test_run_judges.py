"""`run_judges` as the stage calls it: every setting has its effect, and what it writes says what happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cli.data.records import Candidates
from rlhf_cli.errors import CostLimitError, DataError, UsageError
from rlhf_cli.labeling.label_records import read_labels

SHORT, MIDDLE, LONG = "no", "it may be so", "yes, and here is at length why"
THREE = [Candidates(f"question {number}", (MIDDLE, LONG, SHORT)) for number in range(4)]
PAIRS = [
    Candidates(
        f"question {number}", (SHORT, LONG)[:: 1 if number % 4 else -1], ((0,), (1,)), subset=f"part {number % 2}"
    )
    for number in range(24)
]


def at(endpoint, name: str = "judge", **more):
    return {"url": endpoint.url, "name": name, **more}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_pairs_become_rankings_with_every_vote_and_a_report(endpoint, judged, report, votes, tmp_path):
    found = judged(THREE, panel=[at(endpoint, prompt_price=1.0, completion_price=2.0)])
    assert [ranking.tiers for ranking in found.rankings if ranking] == [((1,), (0,), (2,))] * 4
    host = endpoint.url.split("/")[2]
    assert {ranking.annotator for ranking in found.rankings if ranking} == {f"judge@{host}"}
    assert len(endpoint.requests) == 4 * 3 * 2
    assert found.skipped == {}
    said = report()
    (one,) = said["judges"]
    assert (one["questions"], one["swap_consistency"]["value"], one["longer_wins"]["value"]) == (24, 1.0, 1.0)
    assert one["first_shown_wins"]["value"] == 0.5
    cost = 24 * (100 * 1.0 + 10 * 2.0) / 1e6
    assert (one["prompt_tokens"], one["completion_tokens"]) == (2400, 240)
    assert one["cost"] == said["spent_in_this_run_directory"] == pytest.approx(cost)
    assert any("prefers the longer completion" in warning["text"] for warning in said["warnings"]) is False, (
        "12 pairs are too few"
    )
    written = votes()
    assert len(written) == 24
    assert {tuple(vote["shown"]) for vote in written} == {(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)}
    assert all(vote["ranking"][0] == [1] for vote in written if 1 in vote["shown"])
    assert written[0]["text"].startswith("Because it is longer.")
    labels = list(read_labels(tmp_path / ".label.output" / "labels.jsonl"))
    assert [label.tiers for label in labels] == [((1,), (0,), (2,))] * 4
    assert {label.item for label in labels} == {vote["item"] for vote in written}
    assert found.metrics["judge/questions"] == 24.0
    assert found.metrics["judge/cost"] == pytest.approx(cost)
    assert ("judge " + f"judge@{host}") in dict(found.summary)


def test_permuting_the_answers_permutes_the_ranking_and_asks_nothing_new(endpoint, judged):
    judged(THREE, panel=[at(endpoint)])
    endpoint.requests.clear()
    (ranking,) = judged([Candidates("question 0", (SHORT, MIDDLE, LONG))], panel=[at(endpoint)]).rankings
    assert ranking.tiers == ((2,), (1,), (0,))
    assert endpoint.requests == []


def test_listwise_asks_one_question_a_prompt_and_order(endpoint, judged, report):
    found = judged(THREE, panel=[at(endpoint)], method="listwise")
    assert [ranking.tiers for ranking in found.rankings if ranking] == [((1,), (0,), (2,))] * 4
    assert len(endpoint.requests) == 8
    assert report()["judges"][0]["swap_consistency"] == {"value": 1.0, "interval": [0.3976, 1.0], "count": 12}


def test_a_judge_that_always_prefers_the_first_labels_nothing_but_ties(endpoint, judged, report):
    endpoint.judge = lambda model, answers: "[[A]]"
    found = judged(PAIRS, panel=[at(endpoint)])
    assert {ranking.tiers for ranking in found.rankings if ranking} == {((0, 1),)}
    (one,) = report()["judges"]
    assert (one["swap_consistency"]["value"], one["first_shown_wins"]["value"]) == (0.0, 1.0)
    assert one["known"]["accuracy"]["value"] == 0.5
    assert one["known"]["accuracy_of_decided"]["value"] is None
    assert any("in both orders on 0% of pairs" in warning["text"] for warning in report()["warnings"])


def test_both_orders_off_asks_once_and_believes_it(endpoint, judged, report):
    endpoint.judge = lambda model, answers: "[[A]]"
    found = judged(PAIRS, panel=[at(endpoint)], both_orders=False)
    assert len(endpoint.requests) == 24
    assert {ranking.tiers for ranking in found.rankings if ranking} == {((0,), (1,)), ((1,), (0,))}
    assert report()["judges"][0]["swap_consistency"]["value"] is None


def test_accuracy_is_measured_where_the_order_is_known(endpoint, judged, report):
    """The longer answer is right in a quarter of the pairs, all of them in one subset."""
    found = judged(PAIRS, panel=[at(endpoint)])
    known = report()["judges"][0]["known"]
    assert known["accuracy"]["value"] == 0.25
    assert known["accuracy_where_longer_is_right"]["value"] == 1.0
    assert known["accuracy_where_shorter_is_right"]["value"] == 0.0
    assert known["accuracy_balanced_by_length"] == 0.5
    subsets = report()["panel"]["known_by_subset"]
    assert {name: one["accuracy"]["value"] for name, one in subsets.items()} == {"part 0": 0.5, "part 1": 0.0}
    assert found.metrics["judge/accuracy"] == 0.25
    assert any("worse than chance" in warning["text"] for warning in report()["warnings"])


def test_a_panel_decides_by_majority_and_keeps_each_vote(endpoint, judged, report, votes, tmp_path):
    def judge(model, answers):
        longest = max(answers, key=len)
        wanted = longest if model != "contrary" else min(answers, key=len)
        return f"[[{'AB'[list(answers).index(wanted)]}]]"

    endpoint.judge = judge
    found = judged(PAIRS, panel=[at(endpoint, name) for name in ("one", "two", "contrary")])
    for ranking in found.rankings:
        assert ranking is not None
        assert ranking.completions[ranking.tiers[0][0]] == LONG
        assert ranking.annotator == "panel of 3 judges"
    assert [judge["name"].split("@")[0] for judge in report()["judges"]] == ["one", "two", "contrary"]
    agreement = {tuple(n.split("@")[0] for n in row["judges"]): row for row in report()["panel"]["between_judges"]}
    assert agreement["one", "two"]["same_preference"]["value"] == 1.0
    assert agreement["one", "contrary"]["same_preference"]["value"] == 0.0
    assert (
        sum("prefer the same completion in 0% of 24 pairs" in warning["text"] for warning in report()["warnings"]) == 2
    )
    assert len(votes()) == 24 * 2 * 3
    assert len(list(read_labels(tmp_path / ".label.output" / "labels.jsonl"))) == 24 * 3


def test_the_same_judge_twice_is_refused(endpoint, judged):
    with pytest.raises(UsageError, match=r"panel\.0` and `label\.judge\.panel\.1` are the same judge"):
        judged(PAIRS, panel=[at(endpoint), at(endpoint, concurrency=2)])
    assert endpoint.requests == []


def test_judges_of_one_name_are_told_apart(endpoint, judged, report):
    judged(PAIRS[:1], panel=[at(endpoint), at(endpoint, max_new_tokens=9)])
    names = [judge["name"] for judge in report()["judges"]]
    assert len(set(names)) == 2
    assert {request["max_tokens"] for request in endpoint.requests} == {512, 9}


def test_the_rubric_reaches_the_judge_from_the_recipe_or_a_file(endpoint, judged, tmp_path):
    judged(PAIRS[:1], panel=[at(endpoint)], rubric="Prefer rhymes.")
    (tmp_path / "rubric.md").write_text("\ufeffPrefer brevity.\n", encoding="utf-8")
    judged(PAIRS[:1], panel=[at(endpoint)], rubric_file=str(tmp_path / "rubric.md"))
    systems = [request["messages"][0]["content"] for request in endpoint.requests]
    assert ["Prefer rhymes." in text for text in systems] == [True, True, False, False]
    assert ["What to look for:\nPrefer brevity." in text for text in systems] == [False, False, True, True]


def test_verdicts_are_asked_for_once_whatever_runs_again(endpoint, judged, report):
    judged(PAIRS, panel=[at(endpoint)])
    assert len(endpoint.requests) == 48
    first = report()
    judged(PAIRS, panel=[at(endpoint)])
    assert len(endpoint.requests) == 48
    again = report()
    assert first["judges"][0].pop("replies_of_this_run") == 48
    assert again["judges"][0].pop("replies_of_this_run") == 0
    assert first == again
    judged(PAIRS, panel=[at(endpoint, max_new_tokens=100)])
    assert len(endpoint.requests) == 96, "another length is another judge"
    judged(PAIRS, panel=[at(endpoint, concurrency=3, timeout=9.0, retries=1, prompt_price=9.0)])
    assert len(endpoint.requests) == 96, "effort and prices are not"


def test_prompts_without_verdicts_are_left_out_and_too_many_end_the_run(endpoint, judged, report, votes):
    endpoint.judge = lambda model, answers: "Hard to say." if LONG in answers[0] else "[[A]]"
    with pytest.raises(DataError, match=r"ranked none of 24 prompts: 24 no verdict by any judge"):
        judged(PAIRS, panel=[at(endpoint)])
    assert report()["judges"][0]["failures"] == {"no verdict in the reply": 24}
    assert sum(vote["failure"] is not None for vote in votes()) == 24
    endpoint.judge = lambda model, answers: "[[C]]"
    rows = [*PAIRS, Candidates("question 99", ("a", "bb"))]
    with pytest.raises(DataError, match=r"more than `data.max_skip: 0.01`"):
        judged(rows, panel=[at(endpoint)])
    found = judged(rows, panel=[at(endpoint)], data={"max_skip": 0.99})
    assert found.rankings[:24] == [None] * 24
    assert found.rankings[24] is not None
    assert found.skipped == {"no verdict by any judge": 24}
    assert report()["skipped"] == {"no verdict by any judge": 24}


def test_a_ranking_needs_verdicts_on_half_of_its_pairs(endpoint, judged, report):
    """Of three pairs, those with the longest answer fail: one verdict is no ranking of three."""
    endpoint.judge = lambda model, answers: "?" if LONG in answers else "[[A > B]]"
    with pytest.raises(DataError, match="4 verdicts on less than half of its pairs"):
        judged(THREE, panel=[at(endpoint)])
    endpoint.judge = lambda model, answers: "?" if {LONG, SHORT} == set(answers) else "[[C]]"
    found = judged([Candidates("other", (MIDDLE, LONG, SHORT))], panel=[at(endpoint)])
    assert found.rankings[0].tiers == ((0, 1, 2),)


# Calibration


def test_below_the_floor_nothing_is_labeled(endpoint, judged, tmp_path):
    rows = [
        {"prompt": f"p{n}", "chosen": LONG if n < 6 else SHORT, "rejected": SHORT if n < 6 else LONG} for n in range(10)
    ]
    people = write(tmp_path / "people.jsonl", rows)
    with pytest.raises(
        DataError, match=r"people\.jsonl: the judges agree with the human rankings on 60\.0% of 10 .*floor: 0\.65"
    ):
        judged(PAIRS, panel=[at(endpoint)], calibration=people, floor=0.65)
    assert len(endpoint.requests) == 20, "calibration alone"
    assert not (tmp_path / ".label.output" / "votes.jsonl").exists()
    kept = json.loads((tmp_path / "kept" / "label" / "calibration.json").read_text())
    assert (kept["panel"]["accuracy"]["value"], kept["floor"]) == (0.6, 0.65)


def test_at_the_floor_labels_are_made_and_calibration_is_asked_once(endpoint, judged, report, tmp_path):
    rows = [
        {"prompt": f"p{n}", "completions": [SHORT, LONG, MIDDLE], "ranking": [[1], [0, 2]], "subset": f"s{n % 2}"}
        for n in range(4)
    ]
    people = write(tmp_path / "people.jsonl", rows)
    found = judged(PAIRS, panel=[at(endpoint)], calibration=people, floor=1.0)
    assert len(endpoint.requests) == 4 * 6 + 48
    said = report()["calibration"]
    assert (said["panel"]["accuracy"]["value"], said["panel"]["accuracy"]["count"]) == (1.0, 8)
    assert sorted(said["subsets"]) == ["s0", "s1"]
    assert found.metrics["judge/calibration"] == 1.0
    assert "agreement with people" in dict(found.summary)
    judged(PAIRS, panel=[at(endpoint)], calibration=people, floor=1.0)
    assert len(endpoint.requests) == 4 * 6 + 48


def test_several_people_on_the_same_answers_all_count_and_are_asked_about_once(endpoint, judged, report, tmp_path):
    row = {"prompt": "p", "completions": [SHORT, LONG]}
    rows = [row | {"ranking": [[1], [0]], "annotator": "ann"}, row | {"ranking": [[0], [1]], "annotator": "bob"}]
    people = write(tmp_path / "people.jsonl", rows)
    judged(PAIRS[:1], panel=[at(endpoint)], calibration=people)
    assert report()["calibration"]["panel"]["accuracy"]["value"] == 0.5
    assert len(endpoint.requests) == 2 + 2


# Cost


def test_the_cost_limit_stops_and_a_higher_one_goes_on(endpoint, judged, report):
    endpoint.usage = (100_000, 0)  # 0.1 a reply
    priced = at(endpoint, prompt_price=1.0)
    with pytest.raises(CostLimitError) as caught:
        judged(PAIRS, panel=[priced], max_cost=1.05)
    assert caught.value.exit_code == 77
    paid = len(endpoint.requests)
    assert 10 <= paid <= 18  # what is in flight may cost more than its length says, since this endpoint counts oddly
    with pytest.raises(CostLimitError):
        judged(PAIRS, panel=[priced], max_cost=1.05)
    assert len(endpoint.requests) == paid, "what was spent before counts"
    judged(PAIRS, panel=[priced], max_cost=9.0)
    assert len(endpoint.requests) == 48
    assert report()["spent_in_this_run_directory"] == pytest.approx(4.8)


def test_attempts_without_an_answer_are_counted_by_the_next_run_too(endpoint, judged, report):
    """A verdict costs 0.00011, an attempt that nobody heard of what it may have."""
    priced = at(endpoint, prompt_price=1.0, completion_price=1.0, concurrency=1, timeout=0.2, retries=0)
    endpoint.then()
    endpoint.then(delay=1.0)
    with pytest.raises(DataError, match=r"no response within 0\.2 s"):
        judged(PAIRS[:2], panel=[priced])
    with pytest.raises(CostLimitError, match=r"have cost 0\.00\d+ \(0\.00\d+ of it for attempts"):
        judged(PAIRS[:2], panel=[priced], max_cost=0.0012)
    assert len(endpoint.requests) == 2
    judged(PAIRS[:2], panel=[priced])
    said = report()
    lost = said["attempts_without_reply"]
    assert lost["count"] == 1
    assert 0.001 < lost["cost"] < 0.002
    assert said["spent_in_this_run_directory"] == pytest.approx(4 * 0.00011 + lost["cost"], abs=2e-6)
    assert said["judges"][0]["cost"] == pytest.approx(4 * 0.00011)


def test_a_response_without_a_completion_is_paid_for_three_times_at_most(endpoint, judged, report):
    empty = json.dumps({"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}).encode()
    priced = at(endpoint, prompt_price=1.0, completion_price=1.0, concurrency=1)
    for run in range(5):
        endpoint.requests.clear()
        endpoint.script.clear()
        if run == 0:
            endpoint.then()
        endpoint.then(body=empty)
        judged(PAIRS[:2], panel=[priced], data={"max_skip": 0.5})
        assert len(endpoint.requests) == [4, 1, 1, 0, 0][run]
        assert report()["judges"][0]["failures"] == {"no chat completion in the response": 1}
        billed = 4 + min(run, 2)
        assert report()["spent_in_this_run_directory"] == pytest.approx(billed * 0.00011, abs=1e-6)


def test_responses_that_cost_nothing_are_asked_for_again(endpoint, judged):
    for run in range(5):
        endpoint.script.clear()
        endpoint.requests.clear()
        if run == 0:
            endpoint.then()
        endpoint.then(body=b"<html>")
        judged(PAIRS[:2], panel=[at(endpoint, concurrency=1)], data={"max_skip": 0.5})
        assert len(endpoint.requests) == (4 if run == 0 else 1)


def test_failures_that_were_paid_for_are_no_sign_of_a_good_endpoint(endpoint, judged):
    """Five of them before any verdict end each run, those of earlier runs being none."""
    empty = json.dumps({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}).encode()
    endpoint.then(times=99, body=empty)
    for run in range(1, 5):
        with pytest.raises(DataError, match="answered without a chat completion"):
            judged(PAIRS, panel=[at(endpoint, prompt_price=1.0, concurrency=1)])
        assert len(endpoint.requests) == 5 * run


def test_calibration_leaves_out_what_a_list_cannot_show_and_says_where(endpoint, judged, tmp_path, capsys):
    rows = [{"prompt": f"p{n}", "completions": [SHORT, LONG], "ranking": [[1], [0]]} for n in range(3)]
    many = [f"answer {n}" for n in range(17)]
    rows.insert(1, {"prompt": "many", "completions": many, "ranking": [[n] for n in range(17)]})
    people = write(tmp_path / "people.jsonl", rows)
    asked = {"panel": [at(endpoint)], "calibration": people, "method": "listwise"}
    with pytest.raises(
        DataError, match=r"more than 16 completions, which `method: listwise` cannot show.*people\.jsonl:2"
    ):
        judged(PAIRS[:1], **asked)
    judged(PAIRS[:1], **asked, data={"max_skip": 0.25})
    assert "people.jsonl:2" in "".join(capsys.readouterr().err.split())
    assert len(endpoint.requests) == 3 * 2 + 2
