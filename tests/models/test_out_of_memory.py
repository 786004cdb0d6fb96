"""Wherever a library or a model's own code may raise anything, too little memory is said to be just that."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rlhf_cli.attention.registry import find
from rlhf_cli.generation.decoding import check_decoding
from rlhf_cli.memory import is_out_of_memory
from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.reward_model.loading import new_reward_model
from rlhf_cli.models.reward_model.model import RewardModel
from rlhf_cli.models.third_party import reading
from tests.conftest import byte_level_tokenizer
from tests.families.zoo import tiny_model

KINDS = (
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
)


@pytest.fixture(params=KINDS, ids=lambda error: type(error).__name__)
def full(request):
    """Return a function that gets no memory."""

    def allocate(*arguments, **named):
        raise request.param

    return allocate


def raises_as_it_is():
    return pytest.raises((MemoryError, RuntimeError), check=is_out_of_memory)


def test_reading_a_model(full, tmp_path: Path):
    with raises_as_it_is(), reading("cannot load weights", tmp_path, ()):
        full()


def test_sampling_from_a_model(full, monkeypatch):
    model = tiny_model("llama", byte_level_tokenizer(pad=True))
    forward = type(model.model).forward
    monkeypatch.setattr(
        type(model.model), "forward", lambda self, **given: (full if given["use_cache"] else forward)(self, **given)
    )
    with raises_as_it_is():
        check_decoding(model, "it")


def test_attention_at_loading(full, tiny_qwen2: Path, monkeypatch):
    monkeypatch.setattr("rlhf_cli.attention.parity.compare", full)
    with raises_as_it_is():
        load_policy(ModelSource(str(tiny_qwen2)))


def test_a_users_attention(full, monkeypatch):
    name = f"{__name__}:attend_{id(full)}"
    monkeypatch.setattr(sys.modules[__name__], name.partition(":")[2], full, raising=False)
    with raises_as_it_is():
        find(name).attend(*[torch.zeros(1, 1, 1)] * 3, layout=None)  # pyright: ignore


def test_the_precision_of_an_encoder(full, tiny_bert: Path, monkeypatch):
    monkeypatch.setattr(RewardModel, "forward", full)
    with raises_as_it_is():
        new_reward_model(ModelSource(str(tiny_bert), precision=torch.bfloat16), template=None, lora=None)


def test_an_encoder_that_fails_in_every_precision_is_not_said_to_need_float32(tiny_bert: Path, monkeypatch, capsys):
    def fail(self, batch):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(RewardModel, "forward", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        new_reward_model(ModelSource(str(tiny_bert), precision=torch.bfloat16), template=None, lora=None)
    assert "float32" not in capsys.readouterr().err
