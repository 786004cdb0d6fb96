from __future__ import annotations

import pytest

from rlhf_cli.data.records import Demonstration, Message, PromptRecord, Ranking
from rlhf_cli.data.splits import split_by_prompt
from rlhf_cli.errors import DataError


def test_a_prompt_is_on_one_side_for_every_kind_and_order():
    prompts = [f"prompt {n}" for n in range(400)]
    train, held_out = split_by_prompt([PromptRecord(p) for p in prompts], 0.25, seed=3)
    assert 60 < len(held_out) < 140
    assert len(train) + len(held_out) == 400
    outside = {record.prompt for record in held_out}
    pairs = [Ranking(p, ("a", b), ((0,), (1,))) for p in reversed(prompts) for b in "bc"]
    for side, is_outside in zip(split_by_prompt(pairs, 0.25, seed=3), (False, True), strict=True):
        assert all((record.prompt in outside) == is_outside for record in side)
    assert {r.prompt for r in split_by_prompt([PromptRecord(p) for p in prompts], 0.25, seed=4)[1]} != outside


def test_a_larger_share_holds_the_smaller_one():
    records = [PromptRecord(str(n)) for n in range(300)]
    small, large = (split_by_prompt(records, share, 0)[1] for share in (0.1, 0.3))
    assert set(small) < set(large)
    assert split_by_prompt(records, 0.0, 0) == (records, [])


def test_plain_text_is_split_by_the_text():
    train, held_out = split_by_prompt([Demonstration("", f"text {n}") for n in range(200)], 0.5, 0)
    assert min(len(train), len(held_out)) > 60


def test_a_split_without_training_records_is_refused():
    records = split_by_prompt([PromptRecord(str(n)) for n in range(20)], 0.5, 0)[1]
    assert records
    with pytest.raises(DataError, match="held-out share"):
        split_by_prompt(records, 0.5, 0)


def test_one_user_turn_and_its_text_fall_on_the_same_side_of_a_split():
    from rlhf_cli.data.records import is_held_out, prompt_key, seed_for

    turn = (Message("user", "How?"),)
    assert prompt_key("How?") == prompt_key(turn)
    assert seed_for("How?", 0, 1) == seed_for(turn, 0, 1)
    assert is_held_out("How?", 0.5, 3) == is_held_out(turn, 0.5, 3)
    assert prompt_key("How?") != prompt_key((Message("system", "How?"),))
