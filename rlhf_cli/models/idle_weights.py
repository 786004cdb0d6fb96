"""Frozen weights that are in memory only while they are used: reference and reward model rest during an update.

On a CPU they lie in a file that is mapped into memory. The system reads a page when it is first used, and gives it back
when `release` says that the model rests; while there is memory to spare it keeps the file's pages itself, so using the
weights again costs no reading. During an update, gradients and activations take the place of these weights.
"""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

import torch
from torch import nn

from rlhf_cli.progress import warn

_ALIGNMENT = 64
"""Bytes; what vector instructions like."""


class IdleWeights:
    """Maps the frozen weights of a model, in place.

    Args:
        model: on a CPU; its weights must not change.
        folder: where the file is, on a disk. It has no name, so it goes with the process.

    Raises:
        OSError: the file cannot be written, or the system cannot map it; the model is unchanged.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        weights = list(model.parameters())
        offsets: list[int] = []
        with tempfile.TemporaryFile(dir=folder) as file:
            for weight in weights:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                offsets.append(file.tell())
                file.write(weight.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            # Private, since torch warns of tensors in memory that it must not write to.
            self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for weight, offset in zip(weights, offsets, strict=True):
            flat = torch.frombuffer(self._pages, dtype=weight.dtype, count=weight.numel(), offset=offset)
            weight.data = flat.view(weight.shape)

    def release(self) -> None:
        """Give the memory back until the weights are used again."""
        self._pages.madvise(mmap.MADV_DONTNEED)


def idle_weights(model: nn.Module, folder: Path | None) -> IdleWeights | None:
    """Map the frozen weights of a model, in place; None where they stay as they are.

    They do on a GPU, where the system cannot release pages in this way (Windows), and where the file cannot be written,
    which is said.

    Args:
        model: a frozen model.
        folder: see `IdleWeights`; None leaves the model as it is.
    """
    is_on_cpu = all(weight.device.type == "cpu" and weight.numel() for weight in model.parameters())
    if folder is None or not is_on_cpu or not hasattr(mmap, "MADV_DONTNEED"):
        return None
    try:
        return IdleWeights(model, folder)
    except OSError as error:
        warn(f"the weights of models that rest stay in memory during updates: {folder}: {error.strerror or error}")
        return None
