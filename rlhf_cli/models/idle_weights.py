"""Frozen weights that are in memory only while they are used: reference and reward model rest during an update.

On a CPU they lie in a file that is mapped into memory. The system reads a page when it is first used, and gives it back
when `rest` says that the model rests; while there is memory to spare it keeps the file's pages itself, so using the
weights again costs no reading. Of a model on a GPU they lie in the memory of the host and are copied when the model is
used. During an update, gradients and activations take the place of these weights.
"""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from rlhf_cli.memory import free_memory, is_out_of_memory
from rlhf_cli.progress import warn

_ALIGNMENT = 64
"""Bytes; the size of a vector register and of a cache line."""


class IdleWeights(Protocol):
    """The weights of a model that rests between its uses."""

    def use(self) -> None:
        """Have the weights ready for passes; called before each use."""
        ...

    def rest(self) -> None:
        """Give their memory back until the next use."""
        ...


class MappedWeights:
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

    def use(self) -> None:
        """Do nothing: the system reads the pages that passes use."""

    def rest(self) -> None:
        """Give the pages back."""
        self._pages.madvise(mmap.MADV_DONTNEED)


class OffloadedWeights:
    """Keeps the frozen weights of a model on a GPU in host memory, and on the GPU while they are used.

    The host memory is not pinned: torch rounds each pinned tensor up to a power of two, and what is pinned cannot be
    swapped out. A copy then takes about three times as long, which is little beside a step of PPO.

    Args:
        model: on a GPU; its weights must not change. They are offloaded at first.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = list(model.parameters())
        self._on_host = [weight.detach().to("cpu") for weight in self._weights]
        self.rest()

    def use(self) -> None:
        """Copy the weights to the GPU."""
        if not self._copied():
            free_memory()
            self._copy()

    def rest(self) -> None:
        """Free the weights on the GPU; passes that are pending there run before anything that takes their memory."""
        for weight in self._weights:
            weight.data = torch.empty(0, dtype=weight.dtype, device=weight.device)

    def _copied(self) -> bool:
        """Whether the weights could be copied; those that were are freed again if not."""
        try:
            self._copy()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.rest()
            return False
        return True

    def _copy(self) -> None:
        for weight, host in zip(self._weights, self._on_host, strict=True):
            weight.data = host.to(weight.device)


def idle_weights(model: nn.Module, folder: Path | None, *, offloads: bool = False) -> IdleWeights | None:
    """Let the frozen weights of a model rest between its uses, in place; None where they stay as they are.

    They do on a GPU without `offloads`, where they are quantized, where the system cannot release pages in this way
    (Windows), and where the file cannot be written, which is said.

    Args:
        model: a frozen model.
        folder: see `MappedWeights`; None leaves a model on a CPU as it is.
        offloads: keep the weights of a model on a GPU in memory of the host.
    """
    weights = list(model.parameters())
    if offloads and all(weight.is_cuda and weight.dtype.is_floating_point for weight in weights):
        return OffloadedWeights(model)
    is_on_cpu = all(weight.device.type == "cpu" and weight.numel() for weight in weights)
    if folder is None or not is_on_cpu or not hasattr(mmap, "MADV_DONTNEED"):
        return None
    try:
        return MappedWeights(model, folder)
    except OSError as error:
        warn(f"the weights of idle models stay in memory during updates: {folder}: {error.strerror or error}")
        return None
