"""The generators of a checkpoint are restored where they exist, whatever the machine that wrote it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.training.random_state import random_state, random_states, restore_random_states, seed_everything


class FakeGPUs:
    """The parts of `torch.cuda` that hold random states, with a state for the current GPU of this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, present: bool, used: bool = True) -> None:
        self.state = torch.arange(16, dtype=torch.uint8)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: present and used)
        monkeypatch.setattr(torch.cuda, "get_rng_state", self._get)
        monkeypatch.setattr(torch.cuda, "set_rng_state", self._set)
        self._present = present

    def _get(self) -> torch.Tensor:
        assert self._present
        return self.state

    def _set(self, state: torch.Tensor) -> None:
        assert self._present
        self.state = state


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


@pytest.mark.parametrize(
    ("wrote", "reads", "said"),
    [
        (False, False, ""),
        (False, True, "written without a GPU: the GPU's generator is seeded"),
        (True, False, "that of the checkpoint's GPU is dropped"),
        (True, True, ""),
    ],
)
def test_a_run_goes_on_with_or_without_a_gpu(wrote, reads, said, monkeypatch, capsys):
    seed_everything(3, 0)
    FakeGPUs(monkeypatch, present=wrote)
    states = random_states(ProcessGroup())
    expected = draws()
    gpu = FakeGPUs(monkeypatch, present=reads)
    gpu.state = torch.zeros(16, dtype=torch.uint8)
    seed_everything(9, 0)
    restore_random_states(states, ProcessGroup(), seed=3)
    assert draws() == expected
    assert gpu.state.tolist() == (list(range(16)) if wrote and reads else [0] * 16)
    text = capsys.readouterr().err
    assert said in text
    assert bool(text) == bool(said)


@pytest.mark.parametrize(
    ("wrote", "reads", "said"),
    [
        (1, 2, "1 of 2 processes are new, and seeded"),
        (2, 1, "those of 1 of 2 processes are dropped"),
        (2, 4, "2 of 4 processes are new, and seeded"),
    ],
)
def test_a_rank_that_the_checkpoint_does_not_have_is_seeded(wrote, reads, said, monkeypatch, capsys):
    FakeGPUs(monkeypatch, present=True)
    states = []
    for rank in range(wrote):
        seed_everything(5, rank)
        states.append(random_state())
    for rank in range(reads):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(reads))
        restore_random_states(states, ProcessGroup(), seed=5)
        found = draws()
        seed_everything(5, rank)
        assert found == draws(), "a checkpoint of step 0: every rank is as it was seeded"
    told = capsys.readouterr().err
    assert said in told
    assert "; only dropout and functions of yours that draw numbers depend on this" in told


def test_a_gpu_that_the_run_does_not_use_is_left_alone(monkeypatch):
    FakeGPUs(monkeypatch, present=True, used=False)
    assert "cuda" not in random_state()
