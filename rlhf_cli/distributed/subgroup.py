"""Consecutive processes of a run that exchange messages among themselves alone."""

from __future__ import annotations

import json
from typing import Any

from rlhf_cli.distributed.process_group import TIMEOUT, exchanged, join
from rlhf_cli.distributed.ranks import rank, world_size


class Subgroup:
    """The processes of a run in groups of equal size, of which this process is in one: ranks 0 to K - 1, K to 2 K - 1.

    Every process of the run makes one at the same time. Messages are JSON, as those of `ProcessGroup`.

    Args:
        size: K processes; it divides their number.

    Attributes:
        index: of this process in its group.
        count: K.
    """

    def __init__(self, size: int) -> None:
        import torch.distributed as distributed

        join()
        self.index, self.count = rank() % size, size
        own = rank() // size
        groups = [
            distributed.new_group([*range(first, first + size)], backend="gloo", timeout=TIMEOUT)
            for first in range(0, world_size(), size)
        ]  # every process takes part in making each
        self._group: Any = groups[own]

    def all_gather_object(self, item: Any) -> list[Any]:
        """The item of every process of the group, in order of rank."""
        return [json.loads(text) for text in exchanged(json.dumps(item).encode(), self.count, self._group)]


_subgroups: dict[int, Subgroup] = {}


def subgroup(size: int) -> Subgroup:
    """Return the group of this process, which is made once; every process calls this first at the same time."""
    if size not in _subgroups:
        _subgroups[size] = Subgroup(size)
    return _subgroups[size]
