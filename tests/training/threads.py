"""Processes that are threads of the test. Torch's own exchanges are tested by the real command."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf_cli.distributed.process_group import ProcessGroup

Result = TypeVar("Result")


class ThreadProcesses(ProcessGroup):
    """One of several threads that exchange through shared memory; what JSON cannot say fails here too."""

    def __init__(self, index: int, count: int, meet: threading.Barrier, told: list[Any]) -> None:
        super().__init__()
        self.index, self.count = index, count
        self._meet, self._told = meet, told

    def all_gather_object(self, item: Any) -> list[Any]:
        return [json.loads(text) for text in self._exchange(json.dumps(item))]

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        told = self._exchange([tensor.detach().clone() for tensor in tensors])
        with torch.no_grad():
            for tensor, parts in zip(tensors, zip(*told, strict=True), strict=True):
                tensor.copy_(torch.stack(parts).sum(dim=0))

    def _exchange(self, item: Any) -> list[Any]:
        self._told[self.index] = item
        self._meet.wait(60)
        found = list(self._told)
        self._meet.wait(60)
        return found


def in_threads(count: int, work: Callable[[ProcessGroup], Result]) -> list[Result]:
    """What `work` returns in each of `count` processes; an exception in one breaks the meetings of the others."""
    meet, told = threading.Barrier(count), [None] * count

    def guarded(index: int) -> Result:
        try:
            return work(ThreadProcesses(index, count, meet, told))
        except BaseException:
            meet.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(guarded, index) for index in range(count)]
        return [one.result() for one in running]
