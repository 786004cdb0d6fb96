"""How a stage shares work among the processes of a run. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from rlhf_cli.distributed.process_group import ProcessGroup

Item = TypeVar("Item")
Result = TypeVar("Result")


def divide(processes: ProcessGroup, items: Sequence[Item], work: Callable[[list[Item]], list[Result]]) -> list[Result]:
    """`work` of all items, of which each process does its share; all get all results, in the order of the items.

    Args:
        processes: those of the run, all of which call this with the same items.
        items: N, possibly fewer than there are processes.
        work: a list of items to as many results, which JSON can say.
    """
    found = processes.all_gather_object(work(processes.shard(items)))
    return [found[place % processes.count][place // processes.count] for place in range(len(items))]
