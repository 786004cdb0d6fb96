"""Comparisons as completion columns and a verdict: published schemas by their columns, others by `data.comparison`."""

# ruff: noqa: E501  (tables of cases: a case a line)

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cli.data.records import Candidates, Message, PromptRecord, Ranking
from rlhf_cli.data.sources import read_records
from rlhf_cli.errors import DataError
from rlhf_cli.recipe.loader import load_recipe
from rlhf_cli.settings.comparison import ComparisonSettings

FIRST, SECOND, TIE = ((0,), (1,)), ((1,), (0,)), ((0, 1),)
USER = Message("user", "q")
user = {"role": "user", "content": "q"}


def turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def read(write):
    return lambda kind, *rows, **options: read_records(write("a.jsonl", list(rows)), kind, **options)


ARENA = {"conversation_a": [user, turn("a")], "conversation_b": [user, turn("b")], "judge": "ada", "model_a": "m", "model_b": "n"}  # fmt: skip
LMSYS = {"prompt": '["q"]', "response_a": '["a"]', "response_b": '["b"]'}
SHP = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "score_A": 1, "score_B": 2}
PKU = {"prompt": "q", "response_0": "a", "response_1": "b", "safer_response_id": 0}
FARM = {"instruction": "q", "input": "x", "output_1": "a", "output_2": "b"}
SUMMARIES = {"info": {"post": "q", "title": "t"}, "summaries": [{"text": "a"}, {"text": "b"}], "worker": "w"}


@pytest.mark.parametrize(
    ("row", "record", "name"),
    [
        pytest.param(ARENA | {"winner": "model_a"}, Ranking((USER,), ("a", "b"), FIRST, annotator="ada"), "Arena", id="Arena"),
        pytest.param(ARENA | {"winner": "model_b", "turn": 1}, Ranking((USER,), ("a", "b"), SECOND, annotator="ada"), "Arena", id="Arena: second"),
        pytest.param(ARENA | {"winner": "tie (bothbad)"}, Ranking((USER,), ("a", "b"), TIE, annotator="ada"), "Arena", id="Arena: both bad"),
        pytest.param({"conversation_a": [user, turn("a"), user, turn("x")], "conversation_b": [user, turn("b"), user, turn("y")], "winner": "model_b", "turn": 1},
                     Ranking((USER,), ("a", "b"), SECOND), "Arena", id="MT-Bench: the first turn was compared"),
        pytest.param(LMSYS | {"winner_model_a": 1, "winner_model_b": 0}, Ranking((USER,), ("a", "b"), FIRST), "Arena", id="LMSYS, lists as text"),
        pytest.param(LMSYS | {"winner_model_a": "0", "winner_model_b": "0"}, Ranking((USER,), ("a", "b"), TIE), "Arena", id="LMSYS: a tie"),
        pytest.param({"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": -3}, Ranking("q", ("a", "b"), FIRST, 3.0), "HelpSteer", id="HelpSteer 2"),
        pytest.param({"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 1}, Ranking("q", ("a", "b"), SECOND, 1.0), "HelpSteer", id="HelpSteer 2: second"),
        pytest.param({"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 0}, Ranking("q", ("a", "b"), TIE), "HelpSteer", id="HelpSteer 2: tie"),
        pytest.param({"context": [user], "response1": "a", "response2": "b", "overall_preference": 2}, Ranking((USER,), ("a", "b"), SECOND, 2.0), "HelpSteer", id="HelpSteer 3"),
        pytest.param(SHP | {"labels": 1}, Ranking("q", ("a", "b"), FIRST), "SHP", id="SHP: 1 is A"),
        pytest.param(SHP | {"labels": 0}, Ranking("q", ("a", "b"), SECOND), "SHP", id="SHP: 0 is B"),
        pytest.param({"question": {"full_text": "q"}, "answer_0": "a", "answer_1": "b", "score_0": -0.5, "score_1": 0.5}, Ranking("q", ("a", "b"), SECOND), "WebGPT", id="WebGPT"),
        pytest.param(PKU | {"better_response_id": 1}, Ranking("q", ("a", "b"), SECOND), "PKU", id="PKU"),
        pytest.param(FARM | {"preference": 2}, Ranking("q\n\nx", ("a", "b"), SECOND), "AlpacaFarm", id="AlpacaFarm, with its input"),
        pytest.param(FARM | {"preference": 1.0}, Ranking("q\n\nx", ("a", "b"), FIRST), "AlpacaFarm", id="AlpacaFarm: a number with a point"),
        pytest.param({"instruction": "q", "completions": [{"response": "a", "overall_score": 1}, {"response": "b", "overall_score": 8.5}, {"response": "c", "overall_score": 8.5}]},
                     Ranking("q", ("a", "b", "c"), ((1, 2), (0,))), "UltraFeedback", id="UltraFeedback, scores that tie"),
        pytest.param({"prompt": "q", "answers": [{"answer": text, "rank": rank} for text, rank in zip("abcdefg", (3.0, 1.0, 2.0, 7.0, 5.0, 4.0, 6.0), strict=True)]},
                     Ranking("q", tuple("abcdefg"), ((1,), (2,), (0,), (5,), (4,), (6,), (3,))), "Nectar", id="Nectar, K = 7"),
        pytest.param(SUMMARIES | {"choice": 0}, Ranking("q", ("a", "b"), FIRST, annotator="w"), "summarize-from-feedback", id="summaries"),
        pytest.param(SUMMARIES | {"choice": 1}, Ranking("q", ("a", "b"), SECOND, annotator="w"), "summarize-from-feedback", id="summaries: second"),
        pytest.param({"question": "q", "response_j": "a", "response_k": "b"}, Ranking("q", ("a", "b"), FIRST), "Stack Exchange", id="Stack Exchange"),
        pytest.param({"input": {"messages": [user], "tools": []}, "preferred_output": [turn("a")], "non_preferred_output": [turn("b")]},
                     Ranking((USER,), ("a", "b"), FIRST), "OpenAI", id="OpenAI"),
        pytest.param({"input": {"text": "q"}, "accept": {"text": "a"}, "reject": {"text": "b"}, "answer": "accept"}, Ranking("q", ("a", "b"), FIRST), "Prodigy", id="Prodigy"),
        pytest.param({"messages": [user, turn("a")], "rejected_response": "b"}, Ranking((USER,), ("a", "b"), FIRST), "rejected reply", id="rejected_response"),
        pytest.param({"messages": [user, turn("a")], "rejected_messages": [user, turn("b")]}, Ranking((USER,), ("a", "b"), FIRST), "rejected one", id="rejected_messages"),
        pytest.param({"prompt": "q", "completions": ["a", "b"], "scores": [0.1, 0.9]}, Ranking("q", ("a", "b"), SECOND), "scores", id="scores"),
        pytest.param({"prompt": "q", "completions": ["a", "b", "c"], "ranks": [3, 1, 1]}, Ranking("q", ("a", "b", "c"), ((1, 2), (0,))), "ranks", id="ranks"),
        pytest.param({"prompt": "q", "response_a": "a", "response_b": "b", "winner": "B"}, Ranking("q", ("a", "b"), SECOND), "a comparison", id="named alike"),
        pytest.param({"prompt": "q", "model_1": "m", "model_2": "n", "output 1": "a", "output 2": "b", "Label": "1"}, Ranking("q", ("a", "b"), FIRST), "a comparison", id="named alike, by number"),
    ],
)  # fmt: skip
def test_published_schemas_are_read_by_their_columns(read, row, record, name):
    loaded = read("ranking", row)
    assert loaded.records == [record]
    assert "read as " in loaded.warnings[0]
    assert name in loaded.warnings[0]
    [items] = read("candidates", row).records
    assert items == Candidates(record.prompt, record.completions, record.tiers)
    assert read("prompt", row).records == [PromptRecord(record.prompt)]


@pytest.mark.parametrize(
    ("winner", "tiers"),
    [
        *[(value, FIRST) for value in ("response_a", "a", "A", "model_a", "Model A", "assistant_a", "left", "first", "Response A")],
        *[(value, SECOND) for value in ("response_b", "b", "right", "model-b", "conversation_b")],
        *[(value, TIE) for value in ("tie", "Tie", "tie (bothbad)", "both_bad", "both", "neither", "equal", "draw", "same")],
    ],
)  # fmt: skip
def test_a_winner_may_be_spelt_in_many_ways(read, winner, tiers):
    [ranking] = read("ranking", {"prompt": "q", "response_a": "a", "response_b": "b", "winner": winner}).records
    assert ranking.tiers == tiers


@pytest.mark.parametrize(("winner", "tiers"), [("1", FIRST), (2, SECOND), (2.0, SECOND), ("2.0", SECOND), ("A", FIRST)])
def test_numbers_are_those_of_the_columns(read, winner, tiers):
    [ranking] = read("ranking", {"prompt": "q", "response_1": "a", "response_2": "b", "winner": winner}).records
    assert ranking.tiers == tiers


@pytest.mark.parametrize("winner", [0, 1, "1", "gpt", True, "c", "chosen"])
def test_a_winner_that_is_not_clear_is_refused_with_a_hint_that_works(read, winner):
    row = {"prompt": "q", "response_a": "a", "response_b": "b", "winner": winner}
    with pytest.raises(DataError, match=r"`winner` is .* not clear") as caught:
        read("ranking", row)
    hint = str(caught.value.hint).partition("--set '")[2].partition("'")[0]
    how = load_recipe(None, [hint], []).recipe.data.comparison
    [ranking] = read("ranking", row, comparison=how).records
    assert ranking.tiers == FIRST


@pytest.mark.parametrize(
    "row",
    [
        SHP | {"labels": 2},
        ARENA | {"winner": "gpt: 4"},
        SUMMARIES | {"choice": "x"},
        {"prompt": "q", "answer yes": "a", "answer no": "b", "answer 1": "c", "answer 2": "d", "winner": "x"},
    ],
)
def test_the_hint_keeps_how_a_row_was_recognized(read, row):
    with pytest.raises(DataError, match="not clear") as caught:
        read("ranking", row)
    hint = str(caught.value.hint).partition("--set '")[2].partition("'`")[0]
    how = load_recipe(None, [hint], []).recipe.data.comparison
    [ranking] = read("ranking", row, comparison=how).records
    assert (ranking.tiers[0], ranking.completions[0]) == ((0,), "c" if "answer 1" in row else "a")


@pytest.mark.parametrize("winner", [None, "", " ", "nan"])
def test_a_missing_verdict_is_counted_and_is_not_an_error(read, winner):
    rows = [{"prompt": "q", "response_a": "a", "response_b": "b", "winner": value} for value in ("a", winner)]
    loaded = read("ranking", *rows)
    assert len(loaded.records) == 1
    assert "1 comparison skipped: no verdict" in loaded.warnings[-1]
    assert [one.known for one in read("candidates", *rows, max_skip=0.0).records] == [FIRST]  # the same item twice


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completions": ["a", "b"], "scores": [1, None]},
        LMSYS | {"winner_model_a": "", "winner_model_b": ""},
        {"input": {"text": "q"}, "accept": {"text": "a"}, "reject": {"text": "b"}, "answer": "ignore"},
    ],
)
def test_rows_without_a_verdict_leave_nothing(read, row):
    with pytest.raises(DataError, match="1 comparison skipped: no verdict"):
        read("ranking", row)


@pytest.mark.parametrize(
    ("row", "piece"),
    [
        (ARENA | {"winner": "model_a", "conversation_b": [{"role": "user", "content": "other"}, turn("b")]}, "differ before the last reply"),
        ({"prompt": "q", "completions": ["a", "b"], "scores": [1]}, "1 values for 2 completions"),
        ({"prompt": "q", "completions": ["a", "b"], "scores": [1, "much"]}, "a finite number"),
        ({"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": "strong"}, "a finite number"),
        ({"prompt": "q", "response_1": "a", "response_2": None, "preference_strength": 1}, "null"),
        (LMSYS | {"prompt": '["q", "r"]', "winner_model_a": 1, "winner_model_b": 0}, "not as many as"),
        ({"prompt": "q", "completions": ["a", "b"], "ranks": [1, 2], "images": ["x"]}, "images"),
    ],
)  # fmt: skip
def test_comparisons_that_cannot_be_read_are_refused(read, row, piece):
    with pytest.raises(DataError, match=piece):
        read("ranking", row)


def test_tools_of_a_prompt_are_counted(read):
    row = {"input": {"messages": [user], "tools": [{"a": 1}]}, "preferred_output": [turn("a")], "non_preferred_output": [turn("b")]}  # fmt: skip
    assert any("`tools`, which is not read" in line for line in read("ranking", row).warnings)


def test_a_demonstration_beside_a_rejected_reply_stays_one(read):
    loaded = read("demonstration", {"messages": [user, turn("a")], "rejected_response": "b"})
    assert [one.completion for one in loaded.records] == ["a"]
    assert "`rejected_response`, which is not read" in loaded.warnings[0]
    with pytest.raises(DataError, match="this is a comparison") as caught:
        read("demonstration", PKU | {"better_response_id": 1})
    assert "label import" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("setting", "row", "record"),
    [
        ("{completions: [x, y], verdict: who, prompt: ask}", {"ask": "q", "x": "a", "y": "b", "who": "y"}, Ranking("q", ("a", "b"), SECOND)),
        ("{completions: [x, y], verdict: who, values: {1: x, 0: y, 2: tie}}", {"prompt": "q", "x": "a", "y": "b", "who": 2}, Ranking("q", ("a", "b"), TIE)),
        ("{completions: [x, y], verdict: who, values: {true: x, false: y}}", {"prompt": "q", "x": "a", "y": "b", "who": False}, Ranking("q", ("a", "b"), SECOND)),
        ("{completions: [y, x], verdict: s, read_as: strength, annotator: by}", {"prompt": "q", "x": "a", "y": "b", "s": 2, "by": "ada"}, Ranking("q", ("b", "a"), SECOND, 2.0, "ada")),
        ("{completions: 'r[].t', verdict: 'r[].s', read_as: scores}", {"prompt": "q", "r": json.dumps([{"t": "a", "s": 1}, {"t": "b", "s": 2}])}, None),
        ("{completions: ['r[].t'], verdict: 'r[].s', read_as: scores}", {"prompt": "q", "r": json.dumps([{"t": "a", "s": 1}, {"t": "b", "s": 2}])}, Ranking("q", ("a", "b"), SECOND)),
        ("{completions: ['r[]'], verdict: best, values: {0: 0, 1: 1, 2: 2}}", {"prompt": "q", "r": ["a", "b", "c"], "best": 2}, Ranking("q", ("a", "b", "c"), ((2,), (0, 1)))),
        ("{completions: [x, y, z], read_as: order}", {"prompt": "q", "x": "a", "y": "b", "z": "c"}, Ranking("q", ("a", "b", "c"), ((0,), (1,), (2,)))),
        ("{completions: [x, y, z], verdict: [i, j, k], read_as: ranks}", {"prompt": "q", "x": "a", "y": "b", "z": "c", "i": 2, "j": 1, "k": 2}, Ranking("q", ("a", "b", "c"), ((1,), (0, 2)))),
        ("{completions: [x, y], verdict: who}", {"prompt": "q", "chosen": "a", "rejected": "b"}, Ranking("q", ("a", "b"), FIRST)),
    ],
)  # fmt: skip
def test_other_comparisons_are_mapped_by_one_setting(read, setting, row, record):
    from rlhf_cli.errors import RecipeError

    if record is None:
        with pytest.raises(RecipeError):
            load_recipe(None, [f"data.comparison={setting}"], [])
        return
    how = load_recipe(None, [f"data.comparison={setting}"], []).recipe.data.comparison
    assert read("ranking", row, comparison=how).records == [record]


def test_a_mapping_of_columns_goes_before_what_is_recognized(read):
    row = {"question": "q", "response_j": "a", "response_k": "b"}
    columns = {"chosen": "response_k", "rejected": "response_j", "prompt": "question"}
    assert read("ranking", row, columns=columns).records == [Ranking("q", ("b", "a"), FIRST)]
    named = {"ask": "q", "response_a": "a", "response_b": "b", "winner": "b"}
    assert read("ranking", named, columns={"prompt": "ask"}).records == [Ranking("q", ("a", "b"), SECOND)]


def test_the_settings_in_the_documentation_are_read():
    text = (Path(__file__).resolve().parents[2] / "docs" / "label-formats.md").read_text(encoding="utf-8")
    settings = [
        line.strip().partition("    ")[0] for line in text.splitlines() if line.startswith("    data.comparison=")
    ]
    assert len(settings) == 5
    for setting in settings:
        assert load_recipe(None, [setting], []).recipe.data.comparison is not None


def test_the_setting_is_only_for_the_rows_that_have_its_columns(read):
    how = ComparisonSettings(completions=["x", "y"], verdict="who")
    assert read("prompt", {"prompt": "q"}, comparison=how).records == [PromptRecord("q")]
    with pytest.raises(DataError, match=r"`data\.comparison` names `y`, which is not there"):
        read("ranking", {"prompt": "q", "x": "a", "who": "x"}, comparison=how)


@pytest.mark.parametrize(
    "settings",
    [
        {"completions": ["a", "b"]},
        {"completions": ["a", "b"], "verdict": "w", "read_as": "order"},
        {"completions": ["a[]"], "read_as": "order"},
        {"completions": ["a", "b"], "verdict": ["v", "w"]},
    ],
)
def test_settings_that_contradict_themselves_are_refused(settings):
    with pytest.raises(ValueError, match=r"read_as|scores"):
        ComparisonSettings(**settings)


def test_import_takes_the_setting(write):
    from typer.testing import CliRunner

    from rlhf_cli.cli.app import app

    source = write("a.csv", "ask;x;y;who\nq;a;b;y\n".replace(";", ","))
    setting = "data.comparison={completions: [x, y], verdict: who, prompt: ask}"
    result = CliRunner().invoke(app, ["label", "import", source, "--set", setting])
    assert result.exit_code == 0
    assert json.loads(result.stdout.splitlines()[0]) == {
        "prompt": "q",
        "completions": ["a", "b"],
        "ranking": [[1], [0]],
    }


# Other tools


TASK = {"prompt": "q", "answer1": "a", "answer2": "b"}


def task(*results: dict, **more: object) -> dict:
    return {"data": TASK, "annotations": [{"completed_by": 7, "result": list(results), **more}]}


def rating(name: str, stars: int) -> dict:
    return {"type": "rating", "to_name": name, "value": {"rating": stars}}


@pytest.mark.parametrize(
    ("row", "tiers"),
    [
        pytest.param(task({"type": "choices", "value": {"choices": ["answer2"]}}), SECOND, id="choices"),
        pytest.param(task({"type": "choices", "value": {"choices": ["Left"]}}), FIRST, id="choices: a side"),
        pytest.param(task({"type": "choices", "value": {"choices": ["tie"]}}), TIE, id="choices: a tie"),
        pytest.param(task({"type": "choices", "value": {"choices": ["fluent"]}}, {"type": "choices", "value": {"choices": ["A"]}}), FIRST, id="choices about something else beside it"),
        pytest.param(task(rating("answer1", 2), rating("answer2", 5)), SECOND, id="ratings"),
        pytest.param(task(rating("answer1", 3), rating("answer2", 3)), TIE, id="equal ratings"),
        pytest.param(TASK | {"pw": "right", "annotation_id": 1, "annotator": 7, "lead_time": 1.5}, SECOND, id="JSON-MIN"),
        pytest.param(TASK | {"pref": "answer1", "annotation_id": 1, "annotator": 7, "id": 2}, FIRST, id="JSON-MIN, choices"),
    ],
)  # fmt: skip
def test_label_studio_is_read_by_any_control(read, row, tiers):
    assert read("ranking", row).records == [Ranking("q", ("a", "b"), tiers, annotator="7")]


@pytest.mark.parametrize(
    "row",
    [
        task({"type": "choices", "value": {"choices": ["fluent"]}}),
        task(rating("answer1", 2)),
        task({"type": "choices", "value": {"choices": ["answer1"]}}, was_cancelled=True),
        TASK | {"pw": "", "annotation_id": 1},
    ],
)
def test_label_studio_without_a_verdict_is_counted(read, row):
    with pytest.raises(DataError, match=r"skipped: (no ranking|no verdict|canceled)"):
        read("ranking", row)


def test_label_studio_tables_are_read(write):
    source = write("a.csv", "id,prompt,answer1,answer2,pw,annotator,annotation_id\n1,q,a,b,left,7,3\n")
    assert read_records(source, "ranking").records == [Ranking("q", ("a", "b"), FIRST, annotator="7")]


def argilla(**responses: object) -> dict:
    fields = {"prompt": "q", "gold": "x", "response-1": "a", "response-2": "b"}
    return {"fields": fields, "responses": {name.replace("_", "-"): [{"value": value, "user_id": "u", "status": "submitted"}] for name, value in responses.items()}}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "tiers"),
    [
        (argilla(order=[{"value": "2", "rank": 1}, {"value": "1", "rank": 2}]), SECOND),
        (argilla(order=[{"value": "A", "rank": 1}, {"value": "B", "rank": 1}]), TIE),
        (argilla(order=["b", "a"]), SECOND),
        (argilla(rating_1=2, rating_2=5), SECOND),
        (argilla(rating_2=2, rating_1=5, quality=3), FIRST),
        (argilla(rating_1=4, rating_2=4), TIE),
        (argilla(preference="response-2", comment="good"), SECOND),
    ],
)
def test_argilla_ranks_by_name_number_letter_or_rating(read, row, tiers):
    kept = {"prompt", "response-1", "response-2"}
    row = row | {"fields": {name: text for name, text in row["fields"].items() if name in kept}}
    assert read("ranking", row).records == [Ranking("q", ("a", "b"), tiers, annotator="u")]


def test_argilla_without_a_verdict_is_counted(read):
    for row in (argilla(rating_1=4), argilla(quality=4), argilla(comment="fine")):
        with pytest.raises(DataError, match="no ranking of its completions"):
            read("ranking", row)
