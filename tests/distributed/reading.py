"""Run as a script by each of two processes: what `UnreadModel.read` does besides dividing weights.

`reading.py FOLDER` reads the model `FOLDER/llama` and writes `FOLDER/reading.json`: with `merges`, the largest
difference of a weight to the adapter merged in one process; without, the number of adapted layers; and how many bytes
of what reading freed the process still holds.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.distributed.process_group import ProcessGroup, leave
from rlhf_cli.models.adapter_files import load_adapter, save_adapter
from rlhf_cli.models.adapter_layers import adapter_layers, adapter_parameters
from rlhf_cli.models.loading import ModelSource, load_policy
from rlhf_cli.models.lora import add_lora, merge_lora
from rlhf_cli.models.sharded_loading import open_policy
from rlhf_cli.models.sharding import is_divided, whole
from rlhf_cli.settings.shared import LoraSettings
from tests.distributed.sharded_helpers import difference, is_main

PIECES, PIECE = 1_000, 2**16
"""Number and bytes of what reading takes and frees: glibc keeps pieces of this size."""


def write_adapter(source: ModelSource, folder: Path) -> dict[str, Tensor]:
    """Write an adapter with random weights; returns the weights of the model with it merged."""
    model = load_policy(source)
    add_lora(model, LoraSettings(rank=3))
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in adapter_parameters(model):
            weight.normal_(std=0.1)
    if is_main():
        save_adapter(model, folder)
    ProcessGroup().barrier()
    merge_lora(model)
    return dict(model.named_parameters())


def merged(source: ModelSource, adapter: Path) -> dict[str, float]:
    """Read a model with an adapter, which is merged, and which stays."""
    expected = write_adapter(source, adapter)
    found = {}
    for merges in (True, False):
        unread = open_policy(source)
        load_adapter(unread.model, adapter)
        model = unread.read(merges=merges)
        found[merges] = {name: whole(weight) for name, weight in model.named_parameters()}
        if merges:
            assert all(map(is_divided, model.parameters()))
    return {
        "difference": difference(expected, found[True]),
        "moved": difference(dict(load_policy(source).named_parameters()), found[True]),
        "adapted": len(adapter_layers(model)),
    }


class Freeing:
    """A stored weight whose first reading takes many pieces of memory and frees them, below one that stays."""

    held: Any = None

    def __init__(self, weight: Any) -> None:
        self._weight = weight

    def __getitem__(self, key: Any) -> Tensor:
        if Freeing.held is None:
            pieces = [b"x" * PIECE for _ in range(PIECES)]
            Freeing.held = b"x" * PIECE  # glibc returns only what is above the highest piece in use
            del pieces
        return self._weight[key]


def kept(source: ModelSource) -> int:
    """Bytes by which the process is larger after reading than before."""
    unread = open_policy(source)
    unread = replace(unread, stored={name: Freeing(weight) for name, weight in unread.stored.items()})
    before = resident()
    unread.read()
    assert Freeing.held is not None
    return resident() - before


def resident() -> int:
    """Resident memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    source = ModelSource(str(folder / "llama"))
    found = merged(source, folder / "adapter") | {"kept": kept(source)}
    if is_main():
        (folder / "reading.json").write_text(json.dumps(found))
    ProcessGroup().barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
