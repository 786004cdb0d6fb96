"""What the scripts of this folder share that compare sharded models with those of one process."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from rlhf_cli.distributed.process_group import ProcessGroup
from rlhf_cli.models.sharding import whole


def one_process() -> ProcessGroup:
    """A process of its own, within the others."""
    alone = ProcessGroup()
    alone.index, alone.count = 0, 1
    return alone


def is_main() -> bool:
    return ProcessGroup().is_main


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def copies(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in weights.items()}


def figures(work: Path) -> list[dict[str, float]]:
    """Losses and norms of gradients of every step."""
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name.split("/")[-1] in FIGURES} for line in lines]


FIGURES = ("loss", "grad_norm", "policy_avg", "value_avg", "scores", "kl")


def furthest(folder: Path, other: Path) -> float:
    """The largest difference of a figure that two runs logged, as a share of it where it is above 1."""
    one, two = figures(folder), figures(other)
    assert len(one) == len(two) > 0
    assert any("grad_norm" in name for name in one[-1])
    return max(
        abs(before[name] - after[name]) / max(1.0, abs(before[name]))
        for before, after in zip(one, two, strict=True)
        for name in before
    )


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: whole(weight) for name, weight in model.named_parameters() if weight.requires_grad}
