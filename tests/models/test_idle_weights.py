"""Weights that rest take no memory of the process, and come back as they were."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rlhf_cli.models.idle_weights import MappedWeights, OffloadedWeights, idle_weights
from rlhf_cli.stages.ppo.models import used

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and other systems keep the pages")


def resident() -> int:
    """Resident bytes of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))


def model(dtype: torch.dtype, width: int = 8) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    made = nn.Sequential(nn.Linear(width, 3), nn.Linear(3, width))
    for weight in made.parameters():
        weight.data = torch.randn(weight.shape, generator=generator).to(dtype)
    made[1].weight = made[0].weight  # tied
    return made.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_before(dtype, tmp_path):
    expected, idle = model(dtype), model(dtype)
    weights = MappedWeights(idle, tmp_path)
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(expected.parameters(), idle.parameters(), strict=True))
        weights.rest()
    assert idle[1].weight is idle[0].weight
    assert not list(tmp_path.iterdir())


def test_resting_weights_take_no_memory(tmp_path):
    large = nn.Linear(4096, 4096, bias=False).requires_grad_(False)  # 64 MiB
    weights = MappedWeights(large, tmp_path)
    total = large.weight.sum()
    used = resident()
    weights.rest()
    assert used - resident() > 60 << 20
    assert large.weight.sum() == total


def test_where_the_file_does_not_fit_weights_stay_in_memory_which_is_said(tmp_path, capsys):
    expected, idle = model(torch.float32), model(torch.float32)
    assert idle_weights(idle, None) is None
    assert capsys.readouterr().err == ""
    assert idle_weights(idle, tmp_path / "missing") is None
    said = capsys.readouterr().err
    assert "stay in memory during updates" in said
    assert f"{tmp_path}/missing: No such file or directory" in said
    assert idle_weights(model(torch.float32).to("meta"), tmp_path) is None
    assert all(torch.equal(*pair) for pair in zip(expected.parameters(), idle.parameters(), strict=True))


def test_offloaded_weights_come_back_for_each_use():
    expected, idle = model(torch.bfloat16), model(torch.bfloat16)
    weights = OffloadedWeights(idle)
    assert all(weight.numel() == 0 for weight in idle.parameters())
    for _ in range(2):
        with used(idle, weights) as ready:
            assert all(torch.equal(*pair) for pair in zip(expected.parameters(), ready.parameters(), strict=True))
            assert ready[1].weight is ready[0].weight
        assert all(weight.numel() == 0 for weight in idle.parameters())


@pytest.mark.parametrize(("failures", "works"), [(1, True), (2, False)])
def test_a_copy_that_gets_no_memory_is_tried_once_more_and_leaves_nothing(failures, works, monkeypatch):
    idle = model(torch.float32)
    weights, copy, calls = OffloadedWeights(idle), torch.Tensor.to, []

    def failing(tensor: torch.Tensor, *given: object) -> torch.Tensor:
        calls.append(tensor)
        if len(calls) % 2 == 0 and len(calls) <= 2 * failures:  # after the first weight
            raise RuntimeError("CUDA error: out of memory")
        return copy(tensor, *given)

    monkeypatch.setattr(torch.Tensor, "to", failing)
    held: list[int] = []
    monkeypatch.setattr(
        "rlhf_cli.models.idle_weights.free_memory",
        lambda: held.append(sum(weight.numel() for weight in idle.parameters())),
    )
    if works:
        with used(idle, weights):
            assert all(weight.numel() for weight in idle.parameters())
    else:
        with pytest.raises(RuntimeError, match="out of memory"), used(idle, weights):
            pytest.fail("was used")
    assert held == [0]  # what was copied is free again before the second attempt
    assert all(weight.numel() == 0 for weight in idle.parameters())
