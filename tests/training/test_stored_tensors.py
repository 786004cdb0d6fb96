"""The tensors of a checkpoint are read when they are used, and only the parts that are."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from rlhf_cli.training.checkpoint.files import StoredTensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int16, torch.int64, torch.bool])
def test_values_are_those_of_the_file(dtype: torch.dtype, tmp_path: Path):
    shapes = {"b": (3, 5), "a": (), "empty": (0, 4), "c.d": (7,)}
    expected = {name: (torch.randn(shape) * 9).to(dtype) for name, shape in shapes.items()}
    save_file(expected, tmp_path / "x", metadata={"format": "pt"})
    found = StoredTensors(tmp_path / "x")
    assert set(found) == set(expected)
    assert len(found) == len(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


def test_writing_to_a_tensor_does_not_change_the_file(tmp_path: Path):
    save_file({"a": torch.ones(4)}, tmp_path / "x")
    found = StoredTensors(tmp_path / "x")
    found["a"].zero_()
    assert torch.equal(found["a"], torch.ones(4))


def test_only_the_part_that_is_used_takes_memory(tmp_path: Path):
    """A tensor of 4 GB, of which the disk holds the last number alone."""
    rows = 2**24
    header = json.dumps({"a": {"dtype": "F32", "shape": [rows, 64], "data_offsets": [0, rows * 256]}}).encode()
    with (tmp_path / "x").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(rows * 256 - 4, 1)
        file.write(torch.tensor(3.5).numpy().tobytes())
    before = psutil.Process().memory_info().rss
    whole = StoredTensors(tmp_path / "x")["a"]
    part = whole.chunk(4)[3][-1_000:].clone()
    assert part.sum() == part[-1, -1] == 3.5
    assert psutil.Process().memory_info().rss - before < 50e6
