"""Rows of supervised fine-tuning: what is scored, what shares a row, which rows share a step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlhf_cli.attention.groups import plan_groups
from rlhf_cli.data.chat_format import PromptFormat
from rlhf_cli.data.examples import Example, tokenize
from rlhf_cli.data.records import Demonstration, Message
from rlhf_cli.stages.sft.data import (
    BatchPlan,
    CausalCollator,
    GroupCollator,
    Seq2SeqCollator,
    describe_turns,
    pack,
    pack_groups,
)


@given(st.lists(st.integers(1, 20), max_size=40))
@settings(max_examples=60, deadline=None)
def test_packing_keeps_every_example_whole_and_no_row_too_long(lengths: list[int]):
    rows = pack(lengths, 20)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= 20 for row in rows)
    # Two rows that would fit into one are one: best fit leaves at most one row half empty.
    assert sum(sum(lengths[number] for number in row) <= 10 for row in rows) <= 1


def test_packing_prefers_the_tightest_row():
    assert pack([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]
    assert pack([7, 8, 2, 3], 10) == [[1, 2], [0, 3]]


@pytest.mark.parametrize(("rows", "epochs", "batch"), [(10, 2.0, 4), (5, 1.0, 8), (7, 1.5, 2)])
def test_every_step_but_the_last_has_the_batch_size(rows: int, epochs: float, batch: int):
    plan = BatchPlan(rows, epochs, batch, seed=0)
    steps = [plan.rows_of(step) for step in range(plan.steps)]
    assert [len(step) for step in steps[:-1]] == [batch] * (plan.steps - 1)
    assert 0 < len(steps[-1]) <= batch
    assert sum(map(len, steps)) == round(rows * epochs)
    seen = Counter(row for step in steps for row in step)
    assert set(seen.values()) <= {int(epochs), int(epochs) + 1}  # each row once per epoch


def test_order_depends_on_seed_and_epoch():
    def order(seed: int) -> list[int]:
        plan = BatchPlan(12, 2.0, 6, seed)
        return [row for step in range(plan.steps) for row in plan.rows_of(step)]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0)[:12] != order(0)[12:]


def test_epoch_counts_rows():
    plan = BatchPlan(6, 2.0, 4, seed=0)
    assert [plan.epoch_after(step) for step in range(4)] == pytest.approx([0, 4 / 6, 8 / 6, 2.0])


def collate(collator, *rows: list[Example]):
    batch = collator(rows)
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def predictions(batch) -> list[tuple[int, int, int, int]]:
    """(row, target, in how many completions, in how many texts), in the order of rows."""
    return list(zip(*(batch[key] for key in ("predicting", "targets", "completions", "texts")), strict=True))


def test_causal_rows_score_completions_and_nothing_across_examples():
    packed = [Example([5, 6], [7, 8]), Example([], [9, 4])]
    batch = collate(CausalCollator(packed=True), packed, [Example([3], [2])])
    assert batch["input_ids"] == [[5, 6, 7, 8, 9, 4], [3, 2, 3, 3, 3, 3]]
    assert batch["position_ids"] == [[0, 1, 2, 3, 0, 1], [0, 1, 0, 0, 0, 0]]
    # 6 -> 7, 7 -> 8 and 9 -> 4 are completions; 8 -> 9 would cross into the next example.
    assert predictions(batch) == [(0, 6, 0, 1), (1, 7, 1, 1), (2, 8, 1, 1), (4, 4, 1, 1), (6, 2, 1, 1)]
    assert "position_ids" not in collate(CausalCollator(packed=False), [Example([3], [2])])


def test_earlier_turns_count_as_completions_and_are_shared_like_prompts():
    talks = [Example([5, 6, 7, 8], [2, 1], earlier_turns=((1, 3),)), Example([5, 6, 7, 8], [3, 1])]
    batch = collate(GroupCollator(), talks)
    # 5 -> 6 and 6 -> 7 are trained for the first example alone, and read once.
    assert predictions(batch)[:3] == [(0, 6, 1, 2), (1, 7, 1, 2), (2, 8, 0, 2)]
    batch = collate(CausalCollator(packed=False), talks[:1])
    assert [completions for _, _, completions, _ in predictions(batch)] == [1, 1, 0, 1, 1]


def test_turns_that_are_trained_are_said_where_there_are_several():
    assert describe_turns([Example([5], [6])]) is None
    talks = [Example([5, 6, 7], [1], ((1, 2),)), Example([5], [6]), Example([5, 6, 7], [1], ((1, 2),), 3)]
    assert describe_turns(talks[:2]) == "training on 3 assistant turns in 2 demonstrations"
    assert str(describe_turns(talks)).startswith(
        "training on 5 assistant turns in 3 demonstrations; 3 earlier turns are"
    )


def test_a_shared_prompt_is_read_once_and_counts_for_each_example():
    rows = [Example([5, 6, 7], [8, 1]), Example([4], [1])], [Example([5, 6, 7], [9, 2, 1])]
    batch = collate(GroupCollator(), *rows)
    assert batch["input_ids"] == [[4, 1, 5, 6, 7, 8, 1, 9, 2, 1]]
    assert batch["layout"].positions().tolist() == [[0, 1, 0, 1, 2, 3, 4, 3, 4, 5]]
    assert predictions(batch) == [
        (0, 1, 1, 1),
        (2, 6, 0, 2),  # a token of the prompt, predicted once for two examples
        (3, 7, 0, 2),
        (4, 8, 1, 1),  # both completions begin behind the prompt's last token
        (4, 9, 1, 1),
        (5, 1, 1, 1),
        (7, 2, 1, 1),
        (8, 1, 1, 1),
    ]


def test_what_one_examples_prompt_and_anothers_completion_share_counts_as_either():
    batch = collate(GroupCollator(), [Example([5], [6, 7, 1]), Example([5, 6], [7, 2])])
    assert predictions(batch) == [(0, 6, 1, 2), (1, 7, 2, 2), (2, 1, 1, 1), (2, 2, 1, 1)]


def test_packing_keeps_completions_of_a_prompt_in_one_row():
    examples = [Example([1] * 6, [n, 0]) for n in (2, 3)] + [Example([9] * 5, [4]), Example([1] * 6, [5, 5, 0])]
    assert pack_groups(examples, 14) == [[3, 0, 1], [2]]  # 6 + 3 + 2 + 2 = 13 tokens, where apart they are 25
    assert sorted(map(sorted, pack_groups(examples, 11))) == [[0, 3], [1], [2]]


@given(
    st.lists(st.tuples(st.integers(0, 7), st.lists(st.integers(1, 3), min_size=1, max_size=6)), max_size=14),
    st.integers(13, 30),
)
@settings(max_examples=150, deadline=None)
def test_packed_groups_fit_as_they_are_laid_out_where_prompts_begin_alike(
    drawn: list[tuple[int, list[int]]], capacity: int
):
    examples = [Example([1, 3, 5, 5, 5, 5, 5][:length], completion) for length, completion in drawn]
    rows = pack_groups(examples, capacity)
    assert sorted(number for row in rows for number in row) == list(range(len(examples)))
    for row in rows:
        assert len(plan_groups([examples[n].prompt_ids + examples[n].completion_ids for n in row]).ids) <= capacity


def test_a_prompt_that_begins_as_another_makes_no_row_too_long():
    short, long = [1], [1, 3, 5, 5, 5, 5, 5]
    examples = [Example(short, [2, 0]), Example(short, [9, 0]), Example(long, [4, 0]), Example(long, [7, 0])]
    assert sorted(pack_groups(examples, 16)[0]) == [0, 1, 2, 3]
    assert len(plan_groups([example.prompt_ids + example.completion_ids for example in examples]).ids) <= 16


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 8)), max_size=25),
    st.sampled_from([(0, 3, 9), (5, 5, 5)]),
)
@settings(max_examples=60, deadline=None)
def test_packed_groups_are_whole_and_no_row_too_long(pairs: list[tuple[int, int]], prompts: tuple[int, ...]):
    examples = [Example([kind] * prompts[kind], [7] * length) for kind, length in pairs]
    rows = pack_groups(examples, 18)
    assert sorted(number for row in rows for number in row) == list(range(len(examples)))
    for row in rows:
        read = {tuple(examples[number].prompt_ids) for number in row}
        assert sum(map(len, read)) + sum(len(examples[number].completion_ids) for number in row) <= 18


def test_encoder_decoder_rows_shift_the_completion_behind_the_start_token():
    batch = collate(Seq2SeqCollator(decoder_start=9), [Example([5, 6, 7], [3, 1])], [Example([4], [2, 8, 1])])
    assert batch["encoder_ids"] == [[5, 6, 7], [4, 4, 4]]
    assert batch["encoder_mask"] == [[1, 1, 1], [1, 0, 0]]
    assert batch["input_ids"] == [[9, 3, 9], [9, 2, 8]]
    assert predictions(batch) == [(0, 3, 1, 1), (1, 1, 1, 1), (3, 2, 1, 1), (4, 8, 1, 1), (5, 1, 1, 1)]


def test_ids_are_those_of_later_stages(tiny_llama: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    form = PromptFormat(tokenizer, "Q: {prompt}\nA:")
    example = tokenize(Demonstration("why?", " because"), form, is_encoder_decoder=False)
    assert tokenizer.decode(example.prompt_ids) == "Q: why?\nA:"
    assert example.prompt_ids + example.completion_ids == form.pair_ids("why?", " because")
    assert example.completion_ids[-1] == tokenizer.eos_token_id
    talk = tokenize(Demonstration((Message("user", "why?"),), "so"), form, is_encoder_decoder=False)
    assert tokenizer.decode(talk.prompt_ids) == "<|user|> why?\n<|assistant|> "


def test_text_without_a_prompt_gets_no_template(tiny_llama: Path, tiny_t5: Path):
    form = PromptFormat(AutoTokenizer.from_pretrained(tiny_llama), "Q: {prompt}\nA:")
    assert tokenize(Demonstration("", "plain text"), form, is_encoder_decoder=False).prompt_ids == []
    t5 = AutoTokenizer.from_pretrained(tiny_t5)
    example = tokenize(Demonstration("", "plain text"), PromptFormat(t5), is_encoder_decoder=True)
    assert example.prompt_ids == [t5.eos_token_id]
    assert example.completion_ids.count(t5.eos_token_id) == 1


def test_longest_side():
    example = Example([1, 2, 3], [4, 5])
    assert len(example) == example.longest_side(False) == 5
    assert example.longest_side(True) == 3
