from __future__ import annotations

import pytest

from rlhf_cli.data.records import Demonstration, Message, PromptRecord, Ranking, split_key
from rlhf_cli.data.splits import Split
from rlhf_cli.errors import DataError


def test_a_prompt_is_on_one_side_for_every_kind_and_order():
    prompts = [f"prompt {n}" for n in range(400)]
    train, held_out = Split(0.25, 3).divide([PromptRecord(p) for p in prompts])
    assert 60 < len(held_out) < 140
    assert len(train) + len(held_out) == 400
    outside = {record.prompt for record in held_out}
    pairs = [Ranking(p, ("a", b), ((0,), (1,))) for p in reversed(prompts) for b in "bc"]
    for side, is_outside in zip(Split(0.25, 3).divide(pairs), (False, True), strict=True):
        assert all((record.prompt in outside) == is_outside for record in side)
    assert {r.prompt for r in Split(0.25, 4).divide([PromptRecord(p) for p in prompts])[1]} != outside


def test_a_larger_share_holds_the_smaller_one():
    records = [PromptRecord(str(n)) for n in range(300)]
    small, large = (Split(share, 0).divide(records)[1] for share in (0.1, 0.3))
    assert set(small) < set(large)
    assert Split(0.0, 0).divide(records) == (records, [])


def test_plain_text_is_split_by_the_text():
    train, held_out = Split(0.5, 0).divide([Demonstration("", f"text {n}") for n in range(200)])
    assert min(len(train), len(held_out)) > 60


def test_a_split_without_training_records_is_refused():
    records = Split(0.5, 0).divide([PromptRecord(str(n)) for n in range(20)])[1]
    assert records
    with pytest.raises(DataError, match="held-out share"):
        Split(0.5, 0).divide(records)


@pytest.mark.parametrize(
    "other",
    [
        lambda text: f"{text} ",
        lambda text: f"\n\t{text.replace(' ', '  ')}\u00a0",
        lambda text: text.upper(),
        lambda text: "".join(chr(ord(letter) + 0xFEE0) if "a" <= letter <= "z" else letter for letter in text),
        lambda text: (Message("user", text),),
        lambda text: (Message("system", "You are helpful."), Message("user", f" {text}")),
        lambda text: (Message("user", text), Message("assistant", "ok"), Message("user", "More.")),
    ],
    ids=["trailing blank", "white space", "case", "full width", "one turn", "system message", "first turn"],
)
def test_variants_of_a_question_are_on_its_side_of_the_split(other):
    questions = [f"how do i clean {thing} number {n}?" for n in range(60) for thing in ("shoes", "a pan")]
    split = Split(0.3, 11)
    held_out = [question for question in questions if split.holds_out(question)]
    assert 15 < len(held_out) < 60
    assert [question for question in questions if split.holds_out(other(question))] == held_out


def test_what_differs_in_more_than_form_is_another_question():
    keys = [split_key(text) for text in ("Why?", "Why", "Who?", "Why? Because.", "")]
    assert len(set(keys)) == 5
    assert all(len(key) == 16 for key in keys)
    assert split_key((Message("system", "Speak."),)) == split_key("system: Speak.")


def test_one_user_turn_and_its_text_fall_on_the_same_side_of_a_split():
    from rlhf_cli.data.records import prompt_key, seed_for

    turn = (Message("user", "How?"),)
    assert prompt_key("How?") == prompt_key(turn)
    assert seed_for("How?", 0, 1) == seed_for(turn, 0, 1)
    assert Split(0.5, 3).holds_out("How?") == Split(0.5, 3).holds_out(turn)
    assert prompt_key("How?") != prompt_key((Message("system", "How?"),))
