"""The mathematics of the seeds, as the docstring of `training.random_state` states it, computed here by hand."""

from __future__ import annotations

import hashlib
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.data.records import Message, prompt_key, seed_for, split_key
from rlhf_cli.data.splits import Split
from rlhf_cli.stages.reward_model.plan import member_seed
from rlhf_cli.training.random_state import seed_everything
from rlhf_cli.training.shuffle import shuffled


def first_64_bits(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)


def test_the_seed_of_a_completion():
    key = hashlib.sha256(b'"How?"').hexdigest()
    assert key == prompt_key("How?") == prompt_key((Message("user", "How?"),))
    assert seed_for("How?", 5, 3) == first_64_bits(f"sample 5 3 {key}") // 2
    assert seed_for("Why?", 0, 0) == 2_272_248_608_052_568_602


def test_the_order_of_an_epoch():
    seed = first_64_bits("shuffle prompts 5 2") // 2
    expected = torch.randperm(9, generator=torch.Generator().manual_seed(seed)).tolist()
    assert shuffled(9, seed=5, epoch=2, name="prompts") == expected


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_held_out_prompts(share):
    prompts = [f"Question {number}" for number in range(40)]
    keys = [hashlib.sha256(f"question {prompt.casefold()}".encode()).hexdigest()[:16] for prompt in prompts]
    assert keys == [split_key(prompt) for prompt in prompts]
    expected = [first_64_bits(f"holdout 7 {key}") / 2**64 < share for key in keys]
    assert [Split(share, 7).holds_out(prompt) for prompt in prompts] == expected
    assert 0 < sum(expected) < 40


@pytest.mark.parametrize(("seed", "process", "own"), [(5, 0, 5), (5, 2, 200_011), (2**32 - 1, 1, 100_002)])
def test_the_global_generators(seed, process, own):
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        seed_everything(seed, process)
        assert torch.initial_seed() == own
        assert random.random() == random.Random(own).random()
        assert np.random.random() == np.random.RandomState(own).random_sample()
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def test_the_members_of_an_ensemble():
    context: Any = SimpleNamespace(recipe=SimpleNamespace(seed=5))
    assert [member_seed(context, number) for number in (1, 2, 3)] == [5, 1_000_008, 2_000_011]
