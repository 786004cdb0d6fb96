"""Labels of other tools: which rankings they become, what is skipped, and what is refused."""

# ruff: noqa: E501  (tables of cases: a case a line)

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_cli.data.records import Candidates, Message, PromptRecord, Ranking
from rlhf_cli.data.sources import read_records, validate_source
from rlhf_cli.errors import DataError

PAIR = ((0,), (1,))


@pytest.fixture
def read(write):
    def read_rows(kind, *rows, **options):
        return read_records(write("a.json", json.dumps(list(rows), indent=0)), kind, **({"max_skip": 0.9} | options))

    return read_rows


# OpenAssistant


def message(role: str, text: str, *replies: dict, **fields) -> dict:
    state = {"message_id": f"id of {text}", "deleted": False, "review_result": True}
    return {"role": role, "text": text, "replies": list(replies), **state, **fields}


def ask(text: str, *replies: dict, **fields) -> dict:
    return message("prompter", text, *replies, **fields)


def say(text: str, rank: int | None = None, *replies: dict, **fields) -> dict:
    return message("assistant", text, *replies, **({} if rank is None else {"rank": rank}), **fields)


def tree(root: dict) -> dict:
    return {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": root}


def user(text: str) -> Message:
    return Message("user", text)


def test_every_question_with_ranked_replies_is_a_ranking(read):
    root = ask("q", say("b", 1), say("a", 0, ask("q2", say("x", 0), say("y", 1)), ask("q3", say("z", 0))), say("c", 2))
    loaded = read("ranking", tree(root))
    before = (user("q"), Message("assistant", "a"))
    assert loaded.records == [
        Ranking((user("q"),), ("b", "a", "c"), ((1,), (0,), (2,))),
        Ranking((*before, user("q2")), ("x", "y"), PAIR),
    ]
    assert [record.location.rpartition(":")[2] for record in loaded.records] == [
        "2 (replies to id of q)",
        "2 (replies to id of q2)",
    ]
    [warning] = loaded.warnings
    assert "OpenAssistant tree" in warning
    assert read("candidates", tree(root)).records[0] == Candidates((user("q"),), ("b", "a", "c"), ((1,), (0,), (2,)))


@pytest.mark.parametrize(
    ("root", "answers", "tiers", "said"),
    [
        pytest.param(ask("q", say("a", 1), say("b", 1), say("c", 0)), ("a", "b", "c"), ((2,), (0, 1)), [], id="equal ranks tie"),
        pytest.param(ask("q", say("a", 7), say("b", 2)), ("a", "b"), ((1,), (0,)), [], id="ranks with gaps"),
        pytest.param(ask("q", say("a", 0), say("b", 1, deleted=True), say("c", 2)), ("a", "c"), PAIR, ["1 OpenAssistant message skipped"], id="deleted"),
        pytest.param(ask("q", say("a", 0), say("b", 1, review_result=False), say("c", 2)), ("a", "c"), PAIR, ["1 OpenAssistant message skipped"], id="not accepted"),
        pytest.param(ask("q", say("a", 0), say("b", 1, review_result=None), say("c", 2)), ("a", "c"), PAIR, ["1 OpenAssistant message skipped"], id="not reviewed"),
        pytest.param(ask("q", say("a", 0), say("b"), say("d"), say("c", 2)), ("a", "c"), PAIR, ["2 OpenAssistant replies skipped: no `rank`"], id="no rank"),
        pytest.param(ask("q", say("a", 0), ask("me again"), say("c", 2)), ("a", "c"), PAIR, [], id="a reply of another prompter"),
        pytest.param({"role": "prompter", "text": "q", "replies": [{"role": "assistant", "text": t, "rank": r} for t, r in (("a", 0), ("b", 1))]},
                     ("a", "b"), PAIR, [], id="without ids, reviews and empty lists"),
    ],
)  # fmt: skip
def test_only_accepted_and_ranked_replies_are_in_the_ranking(read, root, answers, tiers, said):
    loaded = read("ranking", tree(root))
    assert loaded.records == [Ranking((user("q"),), answers, tiers)]
    skipped = [line for line in loaded.warnings if "skipped" in line]
    assert len(skipped) == len(said)
    assert all(piece in line for piece, line in zip(said, skipped, strict=True))
    assert validate_source(loaded.records[0].location.rpartition(":")[0], "ranking").warnings == loaded.warnings


def test_nothing_below_a_deleted_message_is_used(read):
    below = ask("q2", say("x", 0), say("y", 1))
    root = ask(
        "q",
        say("a", 0),
        say("b", 1),
        say("c", 2, below, deleted=True),
        say("d", None, ask("q3", say("v", 0), say("w", 1))),
    )
    records = read("ranking", tree(root)).records
    assert [record.prompt[-1].content for record in records] == [
        "q",
        "q3",
    ]  # a reply without a rank may be gone on from


def test_rankings_come_in_the_order_of_the_tree(read):
    branches = [say(name, rank, ask(f"about {name}", say("x", 0), say("y", 1))) for rank, name in enumerate("ab")]
    records = read("ranking", tree(ask("q", *branches))).records
    assert [record.prompt[-1].content for record in records] == ["q", "about a", "about b"]


def test_trees_without_rankings_are_warnings_and_not_skips(read):
    loaded = read("ranking", tree(ask("q", say("a", 0), say("b", 1))), *[tree(ask("p", say("a", 0)))] * 5, max_skip=0.0)
    assert len(loaded.records) == 1
    assert any("5 OpenAssistant trees skipped" in line for line in loaded.warnings)
    with pytest.raises(DataError, match=r"no usable records.*1 OpenAssistant tree skipped"):
        read("ranking", tree(ask("p", say("a", 0))))


def test_a_very_deep_tree_is_read(read):
    node = ask("end", say("a", 0), say("b", 1))
    for number in range(150):
        node = ask(f"q{number}", say("x", None, node))
    [record] = read("ranking", tree(node)).records
    assert len(record.prompt) == 301


def test_an_empty_reply_is_skipped(read):
    loaded = read("ranking", tree(ask("q", say("a", 0), say(" ", 1))), tree(ask("q", say("a", 0), say("b", 1))))
    assert (len(loaded.records), list(loaded.skips.counts)) == (1, ["completion of white space only"])
    [skip] = loaded.skips
    assert "(replies to id of q)" in skip.location


# Label Studio


def result(value: dict, kind: str = "ranker", **fields) -> dict:
    return {"from_name": "rank", "to_name": "answers", "type": kind, "value": value, **fields}


def ranker(ranks, by=1, **fields) -> dict:
    return {"result": [result({"ranker": ranks})], "completed_by": by, **fields}


def task(*annotations: dict, **data) -> dict:
    items = [{"id": name, "title": f"Answer {name}", "body": f"text {name}"} for name in "abc"]
    return {"id": 7, "data": {"prompt": "p", "items": items, **data}, "annotations": list(annotations)}


def pairwise(selected="left", **fields) -> dict:
    data = {"prompt": "p", "answer2": "second", "answer1": "first"} | fields.pop("data", {})
    one = result({"selected": selected}, "pairwise", **fields)
    return {"data": data, "annotations": [{"result": [one], "completed_by": 1}]}


@pytest.mark.parametrize(
    ("ranks", "tiers"),
    [
        pytest.param({"rank": ["b", "a", "c"]}, ((1,), (0,), (2,)), id="a list"),
        pytest.param(["b", "a", "c"], ((1,), (0,), (2,)), id="a bare list, as older versions"),
        pytest.param({"1": ["b"], "2": ["c", "a"]}, ((1,), (2, 0)), id="buckets named by number"),
        pytest.param({"2": ["c", "a"], "_": [], "1": ["b"]}, ((1,), (2, 0)), id="in any order, nothing left over"),
        pytest.param(
            {"Tier 1": ["b"], "tier-2": [], "tier_10": ["a", "c"]},
            ((1,), (0, 2)),
            id="tiers, an empty one, by number not by letter",
        ),
        pytest.param({"10": ["a"], "9": ["c"], "11": ["b"]}, ((2,), (0,), (1,)), id="by number, not by letter"),
        pytest.param({"1": ["a", "b", "c"]}, ((0, 1, 2),), id="one bucket is one tie"),
        pytest.param({"my ranker": ["c", "b", "a"]}, ((2,), (1,), (0,)), id="a ranker of another name"),
    ],
)
def test_lists_and_buckets_of_rankers_become_tiers(read, ranks, tiers):
    [record] = read("ranking", task(ranker(ranks))).records
    assert record == Ranking("p", ("text a", "text b", "text c"), tiers, annotator="1")


def test_a_ranker_named_by_a_number_is_not_a_bucket(read):
    annotation = {"result": [result({"ranker": {"1": ["b", "a", "c"]}}, from_name="1")]}
    assert read("ranking", task(annotation)).records[0].tiers == ((1,), (0,), (2,))


def test_annotators_are_kept_and_canceled_annotations_are_skipped(read):
    row = task(
        ranker({"rank": ["a", "b", "c"]}, by={"id": 3, "email": "ada@example.org"}),
        ranker({"rank": ["c", "b", "a"]}, by={"id": 4}),
        ranker({"rank": ["c", "a", "b"]}, by=None),
        ranker({"rank": ["c", "a", "b"]}, was_cancelled=True),
        {"result": [result({"choices": ["spam"]}, "choices")], "completed_by": 9},
        {"result": [], "completed_by": 9},
    )
    loaded = read("ranking", row, task())
    assert [record.annotator for record in loaded.records] == ["ada@example.org", "4", None]
    assert [record.location.rpartition(" ")[2] for record in loaded.records] == [
        f"(annotations[{n}])" for n in range(3)
    ]
    assert any("3 Label Studio annotations skipped" in line for line in loaded.warnings)
    assert any("1 Label Studio task skipped" in line for line in loaded.warnings)
    assert sum("a Label Studio task, whose" in line for line in loaded.warnings) == 1
    both = read("candidates", row, task(prompt="other")).records
    assert [record.known for record in both] == [
        None,
        None,
    ]  # the three disagree, and of the other nobody said anything


def test_completions_left_unranked_are_omitted_and_tasks_without_an_order_skipped(read):
    rows = [
        task(ranker({"rank": ["a", "b", "c"]})),
        task(ranker({"rank": ["a", "b"]})),
        task(ranker({"1": ["a"], "_": ["b", "c"]})),
    ]
    loaded = read("ranking", *rows)
    assert [record.completions for record in loaded.records] == [("text a", "text b", "text c"), ("text a", "text b")]
    assert loaded.skips.counts == {"completions left unranked": 1}
    assert any("1 completion skipped: left unranked" in line for line in loaded.warnings)


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        pytest.param(pairwise("left"), ("first", "second"), id="left"),
        pytest.param(pairwise("right"), ("second", "first"), id="right"),
        pytest.param(pairwise("left", to_name="answer2,answer1"), ("second", "first"), id="as the tag names them"),
        pytest.param(pairwise("left", to_name="txt-1,txt-2"), ("first", "second"), id="as tags of other names"),
        pytest.param({"data": {"question": "p", "response_b": "y", "response_a": "x"}, "annotations": pairwise("right")["annotations"]}, ("y", "x"), id="letters"),
        pytest.param({"data": {"text": "p", "right": "r", "left": "l"}, "annotations": pairwise("right")["annotations"]}, ("r", "l"), id="sides"),
    ],
)  # fmt: skip
def test_pairwise_tasks_become_preferences(read, row, answers):
    assert read("ranking", row).records == [Ranking("p", answers, PAIR, annotator="1")]


def test_a_conversation_can_be_the_prompt(read):
    turns = [{"role": "user", "content": "q"}]
    assert read("ranking", task(ranker({"rank": ["a", "b", "c"]}), prompt=turns)).records[0].prompt == (user("q"),)


def test_the_prompt_field_can_be_named(read):
    row = task(ranker({"rank": ["a", "b", "c"]}), topic="t", asked="q")
    del row["data"]["prompt"]
    with pytest.raises(DataError) as caught:
        read("ranking", row)
    assert "which field is the prompt is not clear: there are `topic`, `asked`" in caught.value.message
    assert "data.columns={prompt: NAME}" in str(caught.value.hint)
    assert read("ranking", row, columns={"prompt": "asked"}).records[0].prompt == "q"


# Argilla


def record(responses, **fields) -> dict:
    texts = {"prompt": "p", "response-1": "x", "response-2": "y", "response-3": "z"}
    return {
        "id": "r",
        "fields": texts | fields,
        "metadata": {},
        "suggestions": {},
        "responses": responses,
        "vectors": {},
    }


def ranks(*places: int | None) -> list[dict]:
    return [{"value": f"response-{n}", "rank": place} for n, place in enumerate(places, 1)]


@pytest.mark.parametrize(
    ("row", "tiers", "annotator"),
    [
        pytest.param(record({"ranking": [{"value": ranks(2, 1, 3), "user_id": "u"}]}), ((1,), (0,), (2,)), "u", id="ranks"),
        pytest.param(record({"ranking": [{"value": ranks(2, 1, 1)[::-1], "user_id": "u"}]}), ((1, 2), (0,)), "u", id="equal ranks, in any order"),
        pytest.param(record({"ranking": [{"value": ["response-3", "response-1", "response-2"], "user_id": "None"}]}), ((2,), (0,), (1,)), None, id="names, nobody"),
        pytest.param(record({"ranking": [{"value": ["Response 3", "response_1", "RESPONSE-2"]}]}), ((2,), (0,), (1,)), None, id="names written otherwise"),
        pytest.param(record({"ranking": [{"value": [{"value": "response-2"}, {"value": "response-1"}, {"value": "response-3"}], "user_id": "u"}]}),
                     ((1,), (0,), (2,)), "u", id="without ranks: best first"),
        pytest.param(record([{"user_id": "u", "status": "submitted", "values": {"ranking": {"value": ranks(3, 1, 2)}, "why": {"value": "so"}}}]),
                     ((1,), (2,), (0,)), "u", id="Argilla 1"),
        pytest.param({"id": "r", "status": "completed", "_server_id": "s", "prompt": "p", "response-1": "x", "response-2": "y", "response-3": "z",
                      "ranking.responses": [["response-2", "response-1", "response-3"]], "ranking.responses.users": ["u"], "ranking.responses.status": ["submitted"],
                      "ranking.suggestion": None},
                     ((1,), (0,), (2,)), "u", id="flattened, as on the hub"),
        pytest.param(record({"quality": [{"value": 4, "user_id": "u"}], "tags": [{"value": ["kind", "long"], "user_id": "u"}],
                             "ranking": [{"value": ranks(1, 2, 3), "user_id": "u"}]}), ((0,), (1,), (2,)), "u", id="among other questions"),
    ],
)  # fmt: skip
def test_responses_of_argilla_become_tiers(read, row, tiers, annotator):
    assert read("ranking", row).records == [Ranking("p", ("x", "y", "z"), tiers, annotator=annotator)]


def test_users_are_kept_and_drafts_are_skipped(read):
    given = [{"value": ranks(1, 2, 3), "user_id": name} for name in "uv"]
    row = record({"ranking": [*given, {"value": ranks(3, 2, 1), "user_id": "w", "status": "draft"}]})
    loaded = read("ranking", row, record({}))
    assert [one.annotator for one in loaded.records] == ["u", "v"]
    assert any("1 Argilla response skipped" in line for line in loaded.warnings)
    assert any("1 Argilla record skipped" in line for line in loaded.warnings)
    assert read("candidates", record({})).records == [Candidates("p", ("x", "y", "z"))]


def test_an_incomplete_ranking_is_skipped(read):
    rows = [record({"ranking": [{"value": value}]}) for value in (ranks(1, 2, 3), ranks(1, None, 2), ranks(2, 1))]
    loaded = read("ranking", *rows)
    assert (len(loaded.records), loaded.skips.counts) == (1, {"completions left unranked": 2})


def test_one_of_two_ranking_questions_can_be_named(read):
    row = record({"helpful": [{"value": ranks(1, 2, 3)}], "honest": [{"value": ranks(3, 2, 1)}]})
    with pytest.raises(DataError) as caught:
        read("ranking", row)
    assert "two questions are rankings: `helpful`, `honest`" in caught.value.message
    assert read("ranking", row, columns={"ranking": "honest"}).records[0].tiers == ((2,), (1,), (0,))


# Our own labels


def label(**fields) -> dict:
    row = {
        "item": "i",
        "prompt": "p",
        "completions": ["x", ""],
        "annotator": "ada",
        "outcome": "ranked",
        "ranking": [[1], [0]],
    }
    return (
        row
        | {"shown": [0, 1], "purpose": "label", "known": None, "strength": None, "marks": {}, "note": "", "reason": ""}
        | fields
    )


def test_ordinary_labels_are_rankings_and_may_have_empty_completions(read):
    rows = [
        label(strength=3),
        label(purpose="repeat"),
        label(purpose="gold", known=[[0], [1]]),
        label(annotator="ben", outcome="skipped", ranking=[]),
    ]
    loaded = read("ranking", *rows)
    assert loaded.records == [Ranking("p", ("x", ""), ((1,), (0,)), 2 / 3, "ada")]
    assert any("3 labels skipped" in line for line in loaded.warnings)
    assert read("candidates", rows[3]).records == [Candidates("p", ("x", ""))]
    assert read("candidates", rows[0]).records == [Candidates("p", ("x", ""), ((1,), (0,)))]
    assert read("prompt", rows[0]).records == [PromptRecord("p")]


# Refusals

_BAD_ITEM = task(
    ranker({"rank": ["a", "b", "c"]}), items=[{"id": "a", "body": 3}, {"id": "b", "body": "x"}, {"id": "c"}]
)
_TWICE = task(ranker({"rank": ["a"]}), items=[{"id": "a", "body": "x"}, {"id": "a", "body": "y"}])
_TWO = {"result": [result({"ranker": {"rank": ["a"]}}), result({"ranker": {"rank": ["b"]}}, from_name="other")]}


@pytest.mark.parametrize(
    ("row", "pieces"),
    [
        pytest.param(tree(ask("q", message("system", "x"))), ["`prompt.replies[0].role` is \"system\""], id="role"),
        pytest.param(tree(ask("q", say("a", 0), say("b", 1.5))), ["`prompt.replies[1].rank` is 1.5"], id="rank"),
        pytest.param(tree(ask("q", say("a", 0, "b"))), ["`prompt.replies[0].replies[0]` is \"b\""], id="reply a string"),
        pytest.param(tree({"role": "prompter", "text": None, "replies": []}), ["`prompt.text` is null"], id="text null"),
        pytest.param(tree({"text": "q", "replies": []}), ["`prompt` has no `role`"], id="no role"),
        pytest.param(tree(ask("q", **{"replies": 3})), ["`prompt.replies` is 3"], id="replies a number"),
        pytest.param({"message_id": "m", "parent_id": None, "text": "q", "role": "prompter"}, ["one message of OpenAssistant"], id="messages one by one"),
        pytest.param(task(ranker({"rank": ["a", "b", "d"]})), ["annotations[0].result[0].value.ranker` ranks \"d\"", "`a`, `b`, `c`"], id="an id that is not there"),
        pytest.param(task(ranker({"good": ["a"], "bad": ["b", "c"]})), ["buckets `good`, `bad`", "not clear"], id="buckets without order"),
        pytest.param(task(ranker({"1": ["a"], "tier 1": ["b", "c"]})), ["not clear"], id="two buckets of one number"),
        pytest.param(task(ranker({"rank": "abc"})), ["lists of ids are expected"], id="ranker text"),
        pytest.param(task(ranker({"rank": [["a"], ["b"]]})), ['holds ["a"], which is not an id'], id="ids in lists"),
        pytest.param(task({"result": [result(3)]}), ["`annotations[0].result[0].value` is 3"], id="value a number"),
        pytest.param(task({"result": None}), ["`annotations[0].result` is null"], id="no result"),
        pytest.param(task(_TWO), ["`annotations[0]` has 2 rankings: `rank`, `other`"], id="two rankers"),
        pytest.param(task(ranker({"rank": ["a"]}), items=[]), ["no list of objects with an `id`"], id="no items"),
        pytest.param(_BAD_ITEM, ["`data.items[0].body` is 3"], id="a body that is no text"),
        pytest.param(_TWICE, ["`data.items` has the id \"a\" twice"], id="an id twice"),
        pytest.param(pairwise("both"), ['selected` is "both"'], id="neither side"),
        pytest.param(pairwise(data={"answer3": "x"}), ["which two fields were compared is not clear"], id="three answers side by side"),
        pytest.param(record({"ranking": [{"value": ["response-1", "Response 1"]}]}), ["ranks the same field twice"], id="a field twice"),
        pytest.param(record({"ranking": [{"value": [*ranks(1, 2), {"value": "response-3", "rank": "3"}]}]}), ["a rank that is not a whole number"], id="rank text"),
        pytest.param(record({"ranking": [{"value": ranks(1, 2, 3)}]}, **{"response-2": 5}), ["`fields.response-2` is 5"], id="a field that is no text"),
        pytest.param(record({"ranking": ["x"]}), ["`responses.ranking[0]` is \"x\""], id="a response that is no object"),
        pytest.param(label(outcome="maybe"), ["`outcome` is \"maybe\"", "ranked, skipped, flagged"], id="outcome"),
        pytest.param(label(purpose=None), ["`purpose` is null"], id="purpose"),
        pytest.param(label(strength=5), ["`strength` is 5", "1 to 4"], id="strength"),
        pytest.param(label(ranking=[[0]]), ["lacks 1"], id="half a ranking"),
        pytest.param(task() | record({}), ["this may be a Label Studio task or an Argilla record"], id="of two forms"),
    ],
)  # fmt: skip
def test_wrong_rows_are_refused_with_their_location(read, tmp_path, row, pieces):
    for check in (lambda: read("ranking", row), lambda: validate_source(str(tmp_path / "a.json"), "ranking")):
        with pytest.raises(DataError) as caught:
            check()
        assert f"{tmp_path / 'a.json'}:2" in caught.value.message
        for piece in pieces:
            assert piece in caught.value.message
        assert caught.value.message.isprintable()


@pytest.mark.parametrize("kind", ["demonstration", "prompt"])
@pytest.mark.parametrize("row", [tree(ask("q", say("a", 0), say("b", 1))), task(), record({})])
def test_other_stages_are_told_to_import_first(read, kind, row):
    with pytest.raises(DataError) as caught:
        read(kind, copy.deepcopy(row))
    assert f"holds no {kind}s" in caught.value.message
    assert "rlhf label import" in str(caught.value.hint)


def test_names_in_a_foreign_file_cannot_control_a_terminal(read):
    nasty = "\x1b[2J\u202e" * 9
    for row in (
        tree(ask("q", say("a", 0), say("", 1), message_id=nasty)),
        task({"result": [result({"ranker": {nasty: ["a"], "b": ["b"]}})]}),
        record({nasty: [{"value": ranks(1, 2, "x")}]}),
    ):
        with pytest.raises(DataError) as caught:
            read("ranking", row)
        assert caught.value.message.isprintable()


# Examples that the documentation shows


def _values(block: str) -> Iterator[str]:
    """The JSON values of a block, each of which may have several lines."""
    while block := block.strip():
        _, end = json.JSONDecoder().raw_decode(block)
        yield block[:end]
        block = block[end:]


def test_the_examples_of_the_documentation_are_read(write):
    text = (Path(__file__).resolve().parents[2] / "docs" / "label-formats.md").read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in text.split("```json\n")[1:]]
    is_one = [block.startswith("[") or '"label"' in block for block in blocks]  # a ranking of several records
    examples = [
        one for block, whole in zip(blocks, is_one, strict=True) for one in ([block] if whole else _values(block))
    ]
    assert len(examples) == 9
    for example in examples:
        loaded = read_records(write("a.json", example), "candidates")
        assert (len(loaded.records), loaded.skips.total) == (1, 0)


# Real data


@pytest.mark.real
def test_real_trees_are_read(shared_data):
    """Of the 214 messages with two or more replies 212 have ranked ones; 6 replies of these 214 have no rank."""
    source = str(shared_data / "oasst_trees.jsonl")
    loaded = read_records(source, "ranking")
    assert (len(loaded.records), loaded.skips.total) == (212, 0)
    assert sum(len(record.completions) for record in loaded.records) == 641
    assert all(record.prompt[-1].role == "user" for record in loaded.records)
    assert all(len(tier) == 1 for record in loaded.records for tier in record.tiers)
    assert any("6 OpenAssistant replies skipped" in line for line in loaded.warnings)
    assert len(read_records(source, "candidates").records) == 212
    assert validate_source(source, "ranking").records == 212
